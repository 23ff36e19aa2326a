block Root(tokens: i64[batch, seq], labels: i64[batch, seq], position: i64[batch, seq]):
  params vocab_size, hidden_size
  slots layers, mtp
  h = embedding(tokens, rows = vocab_size, to = hidden_size, name = model.embed_tokens)
  repeat layer, index in layers:
    h = layer(h, position, name = model.layers.{index})
    let h = 3
  logits = linear(h, to = vocab_size, name = lm_head)
  main = cross_entropy(logits, labels)
  output logits = logits
  output main = main
  output balance = collected(balance) * 1
  output total = main

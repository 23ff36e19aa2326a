block Root(tokens: i64[batch, seq], labels: i64[batch, seq], position: i64[batch, seq]):
  params vocab_size, hidden_size
  slots layers, mtp
  h = embedding(tokens, rows = vocab_size, to = hidden_size, name = model.embed_tokens)
  repeat layer, index in layers:
    h = layer(h, position, name = model.layers.{index})
  logits = linear(h, to = vocab_size, name = lm_head)
  main = cross_entropy(logits, labels)
  output logits = logits
  output main = main
  output balance = collected(balance) * 1
  output total = main
  alias head.weight = model.head.weight
  alias lm_head.weight = model.embed_tokens.weight

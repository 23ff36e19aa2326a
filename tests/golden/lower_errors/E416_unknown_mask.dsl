block Root(tokens: i64[batch, seq], labels: i64[batch, seq], position: i64[batch, seq]):
  params vocab_size, hidden_size
  slots layers, mtp
  h = embedding(tokens, rows = vocab_size, to = hidden_size, name = model.embed_tokens)
  repeat layer, index in layers:
    h = layer(h, position, name = model.layers.{index})
  for module, depth in mtp:
    h = drop_last(h, along = seq, count = 1)
    later = drop_first(position, along = seq, count = depth)
    h, normed = module(h, h, later, name = model.layers.{count(layers) + depth - 1})
  logits = linear(h, to = vocab_size, name = lm_head)
  main = cross_entropy(logits, drop_first(labels, along = seq, count = count(mtp)))
  output mtp_logits = logits
  output logits = linear(embedding(tokens, rows = vocab_size, to = hidden_size, name = model.embed_tokens), to = vocab_size, name = lm_head)
  output main = main
  output balance = collected(balance)
  output total = main

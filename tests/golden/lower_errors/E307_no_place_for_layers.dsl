block Root(tokens: i64[batch, seq], labels: i64[batch, seq]):
  params vocab_size, hidden_size
  h = embedding(tokens, rows = vocab_size, to = hidden_size, name = model.embed_tokens)
  logits = linear(h, to = vocab_size, name = lm_head)
  main = cross_entropy(logits, labels) / count_labels(labels)
  output logits = logits
  output main = main
  output balance = collected(balance)
  output total = main

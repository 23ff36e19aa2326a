block Root(tokens: i64[batch, seq], labels: i64[batch, seq], position: i64[batch, seq]):
  params vocab_size, hidden_size
  slots layers, mtp
  h = embedding(tokens, rows = vocab_size, to = hidden_size, name = model.embed_tokens)
  output logits = layers(h, tokens)

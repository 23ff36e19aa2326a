block Root(tokens: i64[batch, seq], lables: i64[batch, seq], position: f32[batch]):
  params vocab_size, hidden_size
  slots layers, mtp
  h = embedding(tokens, rows = vocab_size, to = hidden_size, name = model.embed_tokens)
  repeat layer, index in layers:
    h = layer(h, position, name = model.layers.{index})
  return h

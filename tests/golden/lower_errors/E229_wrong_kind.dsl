block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  a = rms_norm(x, eps = "small", name = norm)
  b = drop_first(x, along = seq, count = 1.5)
  if hidden_size:
    return x
  else:
    return b

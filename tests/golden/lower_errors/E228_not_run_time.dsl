block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return drop_first(x, along = hidden_size, count = 1)

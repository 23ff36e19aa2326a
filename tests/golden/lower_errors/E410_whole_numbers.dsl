block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return embedding(x, rows = hidden_size, to = hidden_size, name = table)

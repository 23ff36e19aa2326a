block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  cos, sin = rope_table(x, dim = 8, theta = 10000)
  return x

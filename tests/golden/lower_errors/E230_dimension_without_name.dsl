block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  a = linear(x, to = 64, name = proj)
  return linear(x, to = (hidden_size + 2) // 2, name = proj)

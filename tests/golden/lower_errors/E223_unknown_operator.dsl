block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  a = lineer(x, to = hidden_size, name = proj)
  return Frobnicate(x)

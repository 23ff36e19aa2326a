block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  a = linear(x, too = hidden_size, name = proj)
  return linear(x, to = hidden_size, to = hidden_size, name = proj)

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  a = linear(x, name = proj)
  b = silu()
  return split(x)

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  y = linear(x, to = hidden_size, name = proj)
  alias copy.weight = proj.weight
  return y

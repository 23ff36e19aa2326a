block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let other = hidden_size
  y = linear(x, to = other, name = up)
  return x + y

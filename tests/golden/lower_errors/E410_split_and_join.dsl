block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let third = hidden_size // 3
  let half = hidden_size // 2
  a, b = split(x, third, third)
  c, d = split(x, half, half)
  return concat(c, c, into = half)

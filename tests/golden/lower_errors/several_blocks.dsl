block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let half = hidden_size // 3
  a = linear(x, to = half, name = a)
  b = linear(x, too = hidden_size, name = b)
  c = a + x
  d = lineer(b, to = hidden_size, name = c)
  e = d + nowhere
  return e + hidden_size

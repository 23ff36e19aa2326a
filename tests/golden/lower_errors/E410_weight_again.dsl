block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  y = linear(x, to = hidden_size, name = proj)
  let wide = 2 * hidden_size
  z = linear(y, to = wide, name = proj)
  return y

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let wide = 2 * hidden_size
  y = linear(x, to = wide, name = up)
  return SwiGLU(y, intermediate_size = 4)

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let wide = 10 ** 12
  return linear(linear(x, to = wide, name = up), to = hidden_size, name = down)

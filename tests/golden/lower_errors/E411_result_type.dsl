block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let wide = 2 * hidden_size
  return linear(x, to = wide, name = proj)

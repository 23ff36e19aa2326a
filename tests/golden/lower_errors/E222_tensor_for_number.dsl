block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let n = x + 1
  return linear(x, to = x, name = proj)

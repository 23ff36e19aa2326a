block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return linear(silu(x), to = hidden_size, name = proj)

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  y = hidden_size * 2
  u = silu(hidden_size)
  return hidden_size

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  y = hidden_size * 2
  z = 1 - x
  u = silu(hidden_size)
  return x + 1

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let half = hidden_size // 2
  a, b, c = split(x, half, half)
  d = silu(x)
  e = split(x, half, half) + d
  return split(x, half, half)

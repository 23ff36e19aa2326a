block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  a = silu(x, x)
  b = SwiGLU(x, x, intermediate_size = 4)
  return x

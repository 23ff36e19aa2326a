block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  a = linear(x, to = hidden_size, name = proj.{0})
  b = SwiGLU(x, intermediate_size = 4, name = mlp.{0}.inner)
  return SwiGLU(x, intermediate_size = 4, name = layers.{1})

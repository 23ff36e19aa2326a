block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  a = linear(x, to = hidden_size, name = proj.{1})
  b = SwiGLU(x, intermediate_size = 4, name = mlp.{0}.inner)
  c = SwiGLU(x, intermediate_size = 4, name = both.{0})
  d = rms_norm(x, name = both.{1})
  e = x * parameter(hidden_size, name = scale.{0}, init = 1)
  return SwiGLU(x, intermediate_size = 4, name = layers.{1})

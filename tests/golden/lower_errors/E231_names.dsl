block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  a = linear(x, to = hidden_size, name = 3)
  b = linear(x, to = hidden_size, name = lambda)
  c = linear(x, to = hidden_size, name = mlp.forward)
  d = linear(x, to = hidden_size, name = mlp.{hidden_size / 3})
  return linear(x, to = hidden_size, name = mlp.{"a b"})

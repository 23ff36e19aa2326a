block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  k, v = cache(silu(x), sigmoid(x))
  return x

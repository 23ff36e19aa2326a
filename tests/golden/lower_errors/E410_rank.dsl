block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  w = parameter(hidden_size, name = t.w, init = 0)
  a = linear(w, to = hidden_size, name = t.a)
  a = rms_norm(w, eps = 1e-6, name = t.norm)
  return x

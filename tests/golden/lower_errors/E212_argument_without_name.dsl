block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  slots ffn = SwiGLU(4)
  return ffn(x)

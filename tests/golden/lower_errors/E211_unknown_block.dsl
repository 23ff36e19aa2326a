block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  slots ffn = SwiGlu(intermediate_size = 4)
  return ffn(x)

block Example(x: [batch, seq, hidden_sise]) -> [batch, seq, width]:
  params hidden_size
  return x

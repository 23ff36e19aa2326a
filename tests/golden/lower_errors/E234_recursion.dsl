block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Other(x, name = other)

block Other(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return x + Example(x, name = example)

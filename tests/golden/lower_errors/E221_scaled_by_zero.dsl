block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let none = 0 * hidden_size
  a = x * none
  b = x + true
  return x / 0

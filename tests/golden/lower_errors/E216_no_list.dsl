block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let n = count(hidden_size)
  let m = count(3)
  return x

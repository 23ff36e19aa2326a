block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let heads = 3
  let width = 4
  a = unflatten(x, heads, width)
  return flatten(x, heads, width)

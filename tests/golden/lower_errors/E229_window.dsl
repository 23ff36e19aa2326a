block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size, window = 2.5
  let heads = 4
  let width = hidden_size // 4
  q = unflatten(x, heads, width)
  a = attention(q, q, q, scale = 1, window = window)
  a = attention(q, q, q, scale = 1, window = true)
  return flatten(a, heads, width)

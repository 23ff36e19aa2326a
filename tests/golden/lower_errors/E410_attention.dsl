block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size, window = 0
  let heads = 4
  let width = hidden_size // 4
  q = unflatten(x, heads, width)
  a = attention(q, q, q, scale = 1, window = window)
  a = attention(q, q, q, scale = 1, window = -3)
  a = attention(q, q, q, scale = 1, window = 2 ** 31)
  a = attention(q, q, q, scale = 1, softcap = 0)
  return flatten(a, heads, width)

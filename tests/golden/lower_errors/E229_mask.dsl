block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size, reach = 4, share = 0.5
  let heads = 4
  let width = hidden_size // 4
  q = unflatten(x, heads, width)
  a = attention(q, q, q, scale = 1, mask = q - k < reech)
  a = attention(q, q, q, scale = 1, mask = q - k)
  a = attention(q, q, q, scale = 1, mask = q - k < share)
  a = attention(q, q, q, scale = 1, mask = q / 2 < k)
  a = attention(q, q, q, scale = 1, mask = q % k == 0)
  a = attention(q, q, q, scale = 1, mask = q * k < 9)
  a = attention(q, q, q, scale = 1, mask = q and k)
  a = attention(q, q, q, scale = 1, mask = max(q, 4) > k)
  a = attention(q, q, q, scale = 1, mask = k < reach)
  a = attention(q, q, q, scale = 1, mask = q - k > 0)
  a = attention(q, q, q, scale = 1, mask = reach > 4)
  a = attention(q, q, q, scale = 1, mask = x - k < 3)
  a = attention(q, q, q, scale = 1, mask = q * 9_000_000_000 > k)
  a = attention(q, q, q, scale = 1, mask = q - k < reach * 2 or k < reach)
  return x

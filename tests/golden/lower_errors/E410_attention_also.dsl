block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let heads = 4
  let width = hidden_size // 4
  q = unflatten(x, heads, width)
  sink = parameter(width, name = sinks.p, init = 0)
  scale = parameter(heads, name = scale.p, init = 1, decay = true)
  index = unflatten(linear(x, to = heads * width, name = index_proj), heads, width)
  key = linear(x, to = width, name = key_proj)
  weight = linear(x, to = width, name = weight_proj)
  chosen = lightning_indexer(index, key, weight, topk = heads)
  a = attention(q, q, q, scale = 1, sinks = sink)
  b = attention(q, q, q, scale = 1, selected = x)
  shares = linear(x, to = heads, name = shares_proj)
  c = attention(q, q, q, scale = 1, selected = lightning_indexer(q, key, shares, topk = heads), window = 3)
  return flatten(a + b, heads, width)

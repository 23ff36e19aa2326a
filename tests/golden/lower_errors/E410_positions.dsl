block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  """States where positions belong, though no spec asks for a mask."""
  params hidden_size, num_attention_heads, head_dim
  q = unflatten(linear(x, to = num_attention_heads * head_dim, name = q_proj), num_attention_heads, head_dim)
  o = attention(q, q, q, x, scale = 1)
  return linear(flatten(o, num_attention_heads, head_dim), to = hidden_size, name = o_proj)

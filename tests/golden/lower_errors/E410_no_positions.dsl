block NoPositions(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Attention that does not know where documents end."""
  params hidden_size, num_attention_heads, head_dim
  q = unflatten(linear(x, to = num_attention_heads * head_dim, name = q_proj), num_attention_heads, head_dim)
  o = attention(q, q, q, scale = 1)
  return linear(flatten(o, num_attention_heads, head_dim), to = hidden_size, name = o_proj)

block SinkGQA(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Grouped-query attention with a learned sink of each head, to a window of tokens or to all (gpt-oss, arXiv 2508.10925)."""
  params hidden_size, num_attention_heads, num_key_value_heads, head_dim, rope_theta = 10000
  params window = 0                                            # 0: attention to all tokens before

  q = unflatten(linear(x, to = num_attention_heads * head_dim, name = q_proj, bias = true), num_attention_heads, head_dim)
  k = unflatten(linear(x, to = num_key_value_heads * head_dim, name = k_proj, bias = true), num_key_value_heads, head_dim)
  v = unflatten(linear(x, to = num_key_value_heads * head_dim, name = v_proj, bias = true), num_key_value_heads, head_dim)
  cos, sin = rope_table(position, dim = head_dim, theta = rope_theta)
  q = rotate_halves(q, cos, sin)
  k = rotate_halves(k, cos, sin)
  k, v = cache(k, v)

  sinks = parameter(num_attention_heads, name = attention.sinks, init = 0)
  if window > 0:
    o = attention(q, k, v, position, scale = head_dim ** -0.5, window = window, sinks = sinks)
  else:
    o = attention(q, k, v, position, scale = head_dim ** -0.5, sinks = sinks)
  return linear(flatten(o, num_attention_heads, head_dim), to = hidden_size, name = o_proj, bias = true)

block CappedGQA(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Grouped-query attention with capped scores, to a window of tokens or to all (Gemma 2, arXiv 2408.00118)."""
  params hidden_size, num_attention_heads, num_key_value_heads, head_dim, rope_theta = 10000
  params softcap = 50
  params window = 0                                            # 0: attention to all tokens before

  require head_dim % 2 == 0, "head_dim ({head_dim}) is odd, but rotary embedding turns pairs of numbers", "make it {head_dim + 1}"
  require num_attention_heads % num_key_value_heads == 0, "num_attention_heads ({num_attention_heads}) is not a multiple of num_key_value_heads ({num_key_value_heads})", "each head of keys serves an equal number of heads of queries"

  q = linear(x, to = num_attention_heads * head_dim, name = q_proj)
  k = linear(x, to = num_key_value_heads * head_dim, name = k_proj)
  v = linear(x, to = num_key_value_heads * head_dim, name = v_proj)
  q = unflatten(q, num_attention_heads, head_dim)
  k = unflatten(k, num_key_value_heads, head_dim)
  v = unflatten(v, num_key_value_heads, head_dim)

  cos, sin = rope_table(position, dim = head_dim, theta = rope_theta)
  q = rotate(q, cos, sin)
  k = rotate(k, cos, sin)
  k, v = cache(k, v)

  if window > 0:
    o = attention(q, k, v, position, scale = head_dim ** -0.5, softcap = softcap, window = window)
  else:
    o = attention(q, k, v, position, scale = head_dim ** -0.5, softcap = softcap)
  o = flatten(o, num_attention_heads, head_dim)
  return linear(o, to = hidden_size, name = o_proj)

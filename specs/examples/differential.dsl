block DifferentialAttention(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Attention by two softmaxes, one less a learned share of the other (arXiv 2410.05258)."""
  params hidden_size, num_attention_heads, head_dim, rope_theta = 10000
  params lambda_init = 0.8                                     # of the share; the paper has it grow with the depth

  let both = 2 * head_dim
  q = unflatten(linear(x, to = num_attention_heads * both, name = q_proj), num_attention_heads, both)
  k = unflatten(linear(x, to = num_attention_heads * both, name = k_proj), num_attention_heads, both)
  v = unflatten(linear(x, to = num_attention_heads * both, name = v_proj), num_attention_heads, both)
  q_1, q_2 = split(q, head_dim, head_dim)
  k_1, k_2 = split(k, head_dim, head_dim)
  cos, sin = rope_table(position, dim = head_dim, theta = rope_theta)
  q_1 = rotate(q_1, cos, sin)
  q_2 = rotate(q_2, cos, sin)
  k_1 = rotate(k_1, cos, sin)
  k_2 = rotate(k_2, cos, sin)
  k_1, k_2, v = cache(k_1, k_2, v)

  first = sum(parameter(head_dim, name = difference.q1, init = 0, std = 0.1) * parameter(head_dim, name = difference.k1, init = 0, std = 0.1))
  second = sum(parameter(head_dim, name = difference.q2, init = 0, std = 0.1) * parameter(head_dim, name = difference.k2, init = 0, std = 0.1))
  share = exp(first) - exp(second) + lambda_init                                                 # eq. 2
  o = attention(q_1, k_1, v, position, scale = head_dim ** -0.5)
  o = o - share * attention(q_2, k_2, v, position, scale = head_dim ** -0.5)                      # eq. 1
  o = (1 - lambda_init) * rms_norm(o, eps = 1e-5, name = subln)                                  # eq. 3
  return linear(flatten(o, num_attention_heads, both), to = hidden_size, name = o_proj)

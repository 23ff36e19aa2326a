block NormedGQA(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Grouped-query attention with rotary embedding of halves, norms of each head's queries and keys, biases, and heads of which a part is turned: dots.llm1 (arXiv 2506.05767), GLM-4.5 (arXiv 2508.06471)."""
  params hidden_size, num_attention_heads, num_key_value_heads, head_dim
  params rope_theta = 10000, rms_norm_eps = 1e-6
  params use_qk_norm = true, attention_bias = false            # of projections from the hidden state
  params partial_rotary_factor = 1                             # how much of a head is turned

  let rotary_dim = floor(head_dim * partial_rotary_factor)
  let rest_dim = head_dim - rotary_dim
  require 0 < partial_rotary_factor and partial_rotary_factor <= 1, "partial_rotary_factor ({partial_rotary_factor}) is not above 0 and at most 1", "1 turns whole heads"
  require rotary_dim > 0 and rotary_dim % 2 == 0, "{rotary_dim} of {head_dim} numbers of a head would be turned, but rotary embedding turns pairs", "choose head_dim and partial_rotary_factor so that their product is even"
  require num_attention_heads % num_key_value_heads == 0, "num_attention_heads ({num_attention_heads}) is not a multiple of num_key_value_heads ({num_key_value_heads})", "each head of keys serves an equal number of heads of queries"

  q = unflatten(linear(x, to = num_attention_heads * head_dim, bias = attention_bias, name = q_proj), num_attention_heads, head_dim)
  k = unflatten(linear(x, to = num_key_value_heads * head_dim, bias = attention_bias, name = k_proj), num_key_value_heads, head_dim)
  v = unflatten(linear(x, to = num_key_value_heads * head_dim, bias = attention_bias, name = v_proj), num_key_value_heads, head_dim)
  if use_qk_norm:
    q = rms_norm(q, eps = rms_norm_eps, name = q_norm)
    k = rms_norm(k, eps = rms_norm_eps, name = k_norm)

  cos, sin = rope_table(position, dim = rotary_dim, theta = rope_theta)
  if rest_dim > 0:
    q_turned, q_rest = split(q, rotary_dim, rest_dim)
    k_turned, k_rest = split(k, rotary_dim, rest_dim)
    q = concat(rotate_halves(q_turned, cos, sin), q_rest, into = head_dim)
    k = concat(rotate_halves(k_turned, cos, sin), k_rest, into = head_dim)
  else:
    q = rotate_halves(q, cos, sin)
    k = rotate_halves(k, cos, sin)
  k, v = cache(k, v)

  o = attention(q, k, v, position, scale = head_dim ** -0.5)
  o = flatten(o, num_attention_heads, head_dim)
  return linear(o, to = hidden_size, name = o_proj)

block NormedGQA(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Grouped-query attention with a norm on every head of queries and keys, and rotary embedding of halves: dots.llm1 (arXiv 2506.05767), section 2.1."""
  params hidden_size, num_attention_heads, num_key_value_heads, head_dim
  params rope_theta = 10000, rms_norm_eps = 1e-6

  require head_dim % 2 == 0, "head_dim ({head_dim}) is odd, but rotary embedding turns pairs of numbers", "make it {head_dim + 1}"
  require num_attention_heads % num_key_value_heads == 0, "num_attention_heads ({num_attention_heads}) is not a multiple of num_key_value_heads ({num_key_value_heads})", "each head of keys serves an equal number of heads of queries"

  let half = head_dim // 2
  q = unflatten(linear(x, to = num_attention_heads * head_dim, name = q_proj), num_attention_heads, head_dim)
  k = unflatten(linear(x, to = num_key_value_heads * head_dim, name = k_proj), num_key_value_heads, head_dim)
  v = unflatten(linear(x, to = num_key_value_heads * head_dim, name = v_proj), num_key_value_heads, head_dim)
  q = rms_norm(q, eps = rms_norm_eps, name = q_norm)
  k = rms_norm(k, eps = rms_norm_eps, name = k_norm)

  # Pairs are (i, i + half) here; those of `rotate` are neighbours.
  cos, sin = rope_table(position, dim = head_dim, theta = rope_theta)
  cos = unflatten(cos, half)
  sin = unflatten(sin, half)
  first, second = split(float32(q), half, half)
  q_cos = broadcast(cos, num_attention_heads)
  q_sin = broadcast(sin, num_attention_heads)
  q = cast(concat(first * q_cos - second * q_sin, second * q_cos + first * q_sin, into = head_dim))
  first, second = split(float32(k), half, half)
  k_cos = broadcast(cos, num_key_value_heads)
  k_sin = broadcast(sin, num_key_value_heads)
  k = cast(concat(first * k_cos - second * k_sin, second * k_cos + first * k_sin, into = head_dim))
  k, v = cache(k, v)

  o = attention(q, k, v, position, scale = head_dim ** -0.5)
  o = flatten(o, num_attention_heads, head_dim)
  return linear(o, to = hidden_size, name = o_proj)

block MLA(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Multi-head latent attention: DeepSeek-V3 report, section 2.1.1, equations 1 to 11."""
  params hidden_size, num_attention_heads, kv_lora_rank
  params q_lora_rank = 0                                       # 0: queries are not compressed
  params qk_nope_head_dim, qk_rope_head_dim, v_head_dim
  params latent_norm_eps = 1e-6                                # also where other norms use another
  params rope_theta = 10000, attention_bias = false            # a bias of projections from and to the hidden state
  params rope_halves = false                                   # turn pairs (i, i + n / 2) instead of (2i, 2i + 1)
  params mla_scale_q_lora = false, mla_scale_kv_lora = false   # latents of the variance of the hidden state (arXiv 2509.01322)
  params yarn_factor = 1                                       # 1: plain rotary embedding
  params yarn_original_max_position_embeddings = 4096, yarn_beta_fast = 32, yarn_beta_slow = 1
  params yarn_mscale = 1, yarn_mscale_all_dim = 0, window = 0  # of attention; 0: all tokens before

  require qk_rope_head_dim % 2 == 0, "qk_rope_head_dim ({qk_rope_head_dim}) is odd, but rotary embedding turns pairs of numbers", "make it {qk_rope_head_dim + 1}"
  require q_lora_rank >= 0, "q_lora_rank ({q_lora_rank}) is negative", "0 leaves the compression of queries out"
  require q_lora_rank > 0 or not mla_scale_q_lora, "mla_scale_q_lora scales compressed queries, and q_lora_rank is 0", "leave it out"
  require yarn_factor >= 1, "yarn_factor ({yarn_factor}) is below 1", "1 is plain rotary embedding"

  let qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
  let kv_head_dim = qk_nope_head_dim + v_head_dim
  let amplitude = 0.1 * yarn_mscale * log(yarn_factor) + 1
  let amplitude_all_dim = 0.1 * yarn_mscale_all_dim * log(yarn_factor) + 1
  let q_scale = (hidden_size / q_lora_rank) ** 0.5 if mla_scale_q_lora else 1                    # of queries, and so of all scores
  let softmax_scale = qk_head_dim ** -0.5 * amplitude_all_dim ** 2 * q_scale

  if q_lora_rank > 0:
    c_q = linear(x, to = q_lora_rank, bias = attention_bias, name = q_a_proj)                    # eq. 6
    c_q = rms_norm(c_q, eps = latent_norm_eps, name = q_a_layernorm)
    q = linear(c_q, from = q_lora_rank, to = num_attention_heads * qk_head_dim, name = q_b_proj) # eq. 7, 8
  else:
    q = linear(x, to = num_attention_heads * qk_head_dim, name = q_proj)
  q = unflatten(q, num_attention_heads, qk_head_dim)
  q_nope, q_rope = split(q, qk_nope_head_dim, qk_rope_head_dim)

  c_kv = linear(x, to = kv_lora_rank + qk_rope_head_dim, bias = attention_bias, name = kv_a_proj_with_mqa) # eq. 1, 3
  c_kv, k_rope = split(c_kv, kv_lora_rank, qk_rope_head_dim)
  c_kv = rms_norm(c_kv, eps = latent_norm_eps, name = kv_a_layernorm)
  if mla_scale_kv_lora:
    c_kv = c_kv * (hidden_size / kv_lora_rank) ** 0.5

  cos, sin = rope_table(position, dim = qk_rope_head_dim, theta = rope_theta, factor = yarn_factor, original_max_position_embeddings = yarn_original_max_position_embeddings, beta_fast = yarn_beta_fast, beta_slow = yarn_beta_slow, attention_factor = amplitude / amplitude_all_dim)
  q_rope = rotate_halves(q_rope, cos, sin) if rope_halves else rotate(q_rope, cos, sin)           # eq. 8
  k_rope = rotate_halves(k_rope, cos, sin) if rope_halves else rotate(k_rope, cos, sin)           # eq. 3
  c_kv, k_rope = cache(c_kv, k_rope)                           # all that a decoder has to remember

  kv = linear(c_kv, from = kv_lora_rank, to = num_attention_heads * kv_head_dim, name = kv_b_proj) # eq. 2, 5
  kv = unflatten(kv, num_attention_heads, kv_head_dim)
  k_nope, v = split(kv, qk_nope_head_dim, v_head_dim)

  q = concat(q_nope, q_rope, into = qk_head_dim)                                                 # eq. 9
  k_rope = broadcast(k_rope, num_attention_heads)                                                # one head for all
  k = concat(k_nope, k_rope, into = qk_head_dim)                                                 # eq. 4
  o = attention(q, k, v, position, scale = softmax_scale, window = window) if window > 0 else attention(q, k, v, position, scale = softmax_scale) # eq. 10
  o = flatten(o, num_attention_heads, v_head_dim)
  return linear(o, to = hidden_size, bias = attention_bias, name = o_proj)                       # eq. 11

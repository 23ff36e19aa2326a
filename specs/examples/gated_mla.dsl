block GatedMLA(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Latent attention whose output is weighed by a sigmoid gate, each number or each head (arXiv 2505.06708)."""
  params hidden_size, num_attention_heads, q_lora_rank, kv_lora_rank
  params qk_nope_head_dim, qk_rope_head_dim, v_head_dim
  params rope_theta = 10000, headwise = false

  let qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
  let kv_head_dim = qk_nope_head_dim + v_head_dim

  c_q = rms_norm(linear(x, to = q_lora_rank, name = q_a_proj), name = q_a_layernorm)
  q = unflatten(linear(c_q, to = num_attention_heads * qk_head_dim, name = q_b_proj), num_attention_heads, qk_head_dim)
  q_nope, q_rope = split(q, qk_nope_head_dim, qk_rope_head_dim)
  c_kv, k_rope = split(linear(x, to = kv_lora_rank + qk_rope_head_dim, name = kv_a_proj_with_mqa), kv_lora_rank, qk_rope_head_dim)
  c_kv = rms_norm(c_kv, name = kv_a_layernorm)

  cos, sin = rope_table(position, dim = qk_rope_head_dim, theta = rope_theta)
  q_rope = rotate(q_rope, cos, sin)
  k_rope = rotate(k_rope, cos, sin)
  c_kv, k_rope = cache(c_kv, k_rope)

  kv = unflatten(linear(c_kv, to = num_attention_heads * kv_head_dim, name = kv_b_proj), num_attention_heads, kv_head_dim)
  k_nope, v = split(kv, qk_nope_head_dim, v_head_dim)
  q = concat(q_nope, q_rope, into = qk_head_dim)
  k = concat(k_nope, broadcast(k_rope, num_attention_heads), into = qk_head_dim)
  o = attention(q, k, v, position, scale = qk_head_dim ** -0.5)
  if headwise:
    gate = linear(x, to = num_attention_heads, name = gate_proj)
    o = o * sigmoid(unflatten(gate, num_attention_heads, 1))                                     # one number a head
  else:
    gate = linear(x, to = num_attention_heads * v_head_dim, name = gate_proj)
    o = o * sigmoid(unflatten(gate, num_attention_heads, v_head_dim))
  return linear(flatten(o, num_attention_heads, v_head_dim), to = hidden_size, name = o_proj)

block SparseMLA(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Latent attention to the keys that a lightning indexer selects: DeepSeek-V3.2 report, section 2.1, equations 1, 2 and 4.

  The indexer learns from attention alone, and attention from the loss of the text alone:
  `detach` keeps them apart. With indexer_loss_weight 0 the indexer is not trained.
  """
  params hidden_size, num_attention_heads, kv_lora_rank, q_lora_rank
  params qk_nope_head_dim, qk_rope_head_dim, v_head_dim
  params index_n_heads, index_head_dim, index_topk             # heads of the indexer; keys that a query sees
  params indexer_loss_weight                                   # of the loss that trains the indexer
  params rope_theta = 10000, attention_bias = false            # a bias of projections from and to the hidden state
  params yarn_factor = 1                                       # 1: plain rotary embedding
  params yarn_original_max_position_embeddings = 4096, yarn_beta_fast = 32, yarn_beta_slow = 1
  params yarn_mscale = 1, yarn_mscale_all_dim = 0

  require qk_rope_head_dim % 2 == 0, "qk_rope_head_dim ({qk_rope_head_dim}) is odd, but rotary embedding turns pairs of numbers", "make it {qk_rope_head_dim + 1}"
  require q_lora_rank > 0, "q_lora_rank is {q_lora_rank}, but the indexer reads compressed queries", "make it at least 1"
  require index_head_dim > qk_rope_head_dim, "index_head_dim ({index_head_dim}) has no room beside the {qk_rope_head_dim} numbers that are turned", "make it at least {qk_rope_head_dim + 1}"
  require yarn_factor >= 1, "yarn_factor ({yarn_factor}) is below 1", "1 is plain rotary embedding"

  let qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
  let kv_head_dim = qk_nope_head_dim + v_head_dim
  let index_nope_head_dim = index_head_dim - qk_rope_head_dim
  let amplitude = 0.1 * yarn_mscale * log(yarn_factor) + 1
  let amplitude_all_dim = 0.1 * yarn_mscale_all_dim * log(yarn_factor) + 1
  let softmax_scale = qk_head_dim ** -0.5 * amplitude_all_dim ** 2

  c_q = linear(x, to = q_lora_rank, bias = attention_bias, name = q_a_proj)
  c_q = rms_norm(c_q, name = q_a_layernorm)
  q = unflatten(linear(c_q, from = q_lora_rank, to = num_attention_heads * qk_head_dim, name = q_b_proj), num_attention_heads, qk_head_dim)
  q_nope, q_rope = split(q, qk_nope_head_dim, qk_rope_head_dim)

  c_kv = linear(x, to = kv_lora_rank + qk_rope_head_dim, bias = attention_bias, name = kv_a_proj_with_mqa)
  c_kv, k_rope = split(c_kv, kv_lora_rank, qk_rope_head_dim)
  c_kv = rms_norm(c_kv, name = kv_a_layernorm)

  cos, sin = rope_table(position, dim = qk_rope_head_dim, theta = rope_theta, factor = yarn_factor, original_max_position_embeddings = yarn_original_max_position_embeddings, beta_fast = yarn_beta_fast, beta_slow = yarn_beta_slow, attention_factor = amplitude / amplitude_all_dim)
  q_rope = rotate(q_rope, cos, sin)
  k_rope = rotate(k_rope, cos, sin)

  index_x = detach(x)
  index_q = unflatten(linear(detach(c_q), from = q_lora_rank, to = index_n_heads * index_head_dim, name = indexer.wq_b), index_n_heads, index_head_dim)
  index_k = layer_norm(linear(index_x, to = index_head_dim, name = indexer.wk), eps = 1e-6, name = indexer.k_norm)
  index_q, index_q_nope = split(index_q, qk_rope_head_dim, index_nope_head_dim)
  index_k, index_k_nope = split(index_k, qk_rope_head_dim, index_nope_head_dim)
  index_q = concat(rotate_halves(index_q, cos, sin), index_q_nope, into = index_head_dim)
  index_k = concat(rotate_halves(index_k, cos, sin), index_k_nope, into = index_head_dim)
  index_weight = float32(linear(index_x, to = index_n_heads, name = indexer.weights_proj)) * (index_n_heads * index_head_dim) ** -0.5

  c_kv, k_rope, index_k = cache(c_kv, k_rope, index_k)         # all that a decoder has to remember
  selected = lightning_indexer(index_q, index_k, index_weight, topk = index_topk)                # eq. 1

  kv = linear(c_kv, from = kv_lora_rank, to = num_attention_heads * kv_head_dim, name = kv_b_proj)
  kv = unflatten(kv, num_attention_heads, kv_head_dim)
  k_nope, v = split(kv, qk_nope_head_dim, v_head_dim)
  q = concat(q_nope, q_rope, into = qk_head_dim)
  k_rope = broadcast(k_rope, num_attention_heads)
  k = concat(k_nope, k_rope, into = qk_head_dim)
  o = attention(q, k, v, position, scale = softmax_scale, selected = selected)                   # eq. 2
  if indexer_loss_weight > 0:
    collect indexer = indexer_loss(q, k, index_q, index_k, index_weight, selected, scale = softmax_scale)  # eq. 4
  o = flatten(o, num_attention_heads, v_head_dim)
  return linear(o, to = hidden_size, bias = attention_bias, name = o_proj)

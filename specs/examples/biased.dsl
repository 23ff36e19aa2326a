block BiasedAttention(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Grouped-query attention with biases (Qwen2), norms of each head's queries and keys (Qwen3), and a learned scale of each head."""
  params hidden_size, num_attention_heads, num_key_value_heads, head_dim, rope_theta = 10000

  q = linear(x, to = num_attention_heads * head_dim, name = q_proj, bias = true)
  k = linear(x, to = num_key_value_heads * head_dim, name = k_proj, bias = true)
  v = linear(x, to = num_key_value_heads * head_dim, name = v_proj, bias = true)
  q = rms_norm(unflatten(q, num_attention_heads, head_dim), name = q_norm)
  k = rms_norm(unflatten(k, num_key_value_heads, head_dim), name = k_norm)
  v = unflatten(v, num_key_value_heads, head_dim)

  cos, sin = rope_table(position, dim = head_dim, theta = rope_theta)
  q = rotate(q, cos, sin)
  k = rotate(k, cos, sin)
  k, v = cache(k, v)

  o = attention(q, k, v, position, scale = head_dim ** -0.5)
  o = o * parameter(num_attention_heads, 1, name = head.scale, init = 1)
  return linear(flatten(o, num_attention_heads, head_dim), to = hidden_size, name = o_proj, bias = true)

block GeGLU(x: [.., hidden_size]) -> [.., hidden_size]:
  """down(gelu(gate(x)) * up(x)), each with a bias (arXiv 2002.05202)."""
  params hidden_size, intermediate_size

  gate = gelu_tanh(linear(x, to = intermediate_size, name = gate_proj, bias = true))
  up = linear(x, to = intermediate_size, name = up_proj, bias = true)
  return linear(gate * up, to = hidden_size, name = down_proj, bias = true)

block ReLUSquared(x: [.., hidden_size]) -> [.., hidden_size]:
  """down(relu(up(x))^2) (Primer, arXiv 2109.08668)."""
  params hidden_size, intermediate_size

  return linear(relu_squared(linear(x, to = intermediate_size, name = up_proj)), to = hidden_size, name = down_proj)

block BiasedMoE(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  """Experts that have biases, chosen by a gate that has one (gpt-oss)."""
  params hidden_size, n_routed_experts, num_experts_per_tok, moe_intermediate_size
  slots expert = GeGLU(intermediate_size = moe_intermediate_size)

  score = softmax(linear(float32(x), to = n_routed_experts, name = router, bias = true))
  topk_indices, weight = topk_groups(score, k = num_experts_per_tok, n_group = 1, topk_group = 1, group_score = "max", normalize = true, scale = 1.0)
  collect balance = sequence_balance_loss(score, k = num_experts_per_tok)
  collect load = expert_load(topk_indices, count = n_routed_experts)
  return experts(x, topk_indices, weight, count = n_routed_experts, expert = expert, name = experts)

block LayerNormLayer(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """A layer with LayerNorm, whose feed-forward network enters by a learned gate (Flamingo, arXiv 2204.14198)."""
  params hidden_size, layer_norm_eps = 1e-5
  slots attention, feed_forward

  x = x + attention(layer_norm(x, eps = layer_norm_eps, name = input_layernorm), position, name = self_attn)
  y = feed_forward(layer_norm(x, eps = layer_norm_eps, name = post_attention_layernorm), name = mlp)
  return x + tanh(parameter(1, name = residual.gate, init = 0)) * y

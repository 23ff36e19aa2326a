block GatedSharedMoE(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  """Experts beside a shared expert that each token weighs by a gate of its own (Qwen2-MoE, arXiv 2407.10671)."""
  params hidden_size, n_routed_experts, num_experts_per_tok, moe_intermediate_size
  params shared_expert_intermediate_size = moe_intermediate_size
  params norm_topk_prob = false
  slots expert = SwiGLU(intermediate_size = moe_intermediate_size)

  affinity = softmax(linear(float32(x), to = n_routed_experts, name = gate))
  topk_indices, weight = topk_groups(affinity, k = num_experts_per_tok, n_group = 1, topk_group = 1, group_score = "max", normalize = norm_topk_prob, scale = 1.0)
  y = experts(x, topk_indices, weight, count = n_routed_experts, expert = expert, name = experts)
  shared = SwiGLU(x, intermediate_size = shared_expert_intermediate_size, name = shared_expert)
  y = y + shared * sigmoid(linear(x, to = 1, name = shared_expert_gate))                         # one number a token

  collect balance = sequence_balance_loss(affinity, k = num_experts_per_tok)
  collect load = expert_load(topk_indices, count = n_routed_experts)
  return y

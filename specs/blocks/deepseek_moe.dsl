block DeepSeekMoE(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  """Fine-grained experts, chosen by a sigmoid gate with a balancing bias: DeepSeek-V3 report, section 2.1.2, equations 12 to 20."""
  params hidden_size, n_routed_experts, num_experts_per_tok, moe_intermediate_size
  params n_shared_experts = 0
  params n_group = 1, topk_group = 1                           # groups of experts, and how many a token may use
  params norm_topk_prob = true, routed_scaling_factor = 1.0
  slots expert = SwiGLU(intermediate_size = moe_intermediate_size)

  require n_routed_experts % n_group == 0, "n_routed_experts ({n_routed_experts}) cannot be cut into {n_group} equal groups", "make n_group a divisor of {n_routed_experts}"
  require n_routed_experts >= 2 * n_group, "a group of {n_routed_experts // n_group} experts has no two highest scores to add up", "lower n_group to at most {n_routed_experts // 2}"
  require topk_group <= n_group, "topk_group ({topk_group}) is more than the {n_group} groups there are", "lower topk_group to at most {n_group}"
  require num_experts_per_tok <= topk_group * n_routed_experts // n_group, "{num_experts_per_tok} experts cannot be chosen from {topk_group} groups of {n_routed_experts // n_group}", "lower num_experts_per_tok to at most {topk_group * n_routed_experts // n_group}, or raise topk_group"

  affinity = sigmoid(linear(float32(x), to = n_routed_experts, name = gate))                     # eq. 15
  topk_indices, weight = topk_groups(affinity, k = num_experts_per_tok, bias = gate.e_score_correction_bias, n_group = n_group, topk_group = topk_group, group_score = "top2_sum", normalize = norm_topk_prob, scale = routed_scaling_factor)  # eq. 13, 14, 16
  y = experts(x, topk_indices, weight, count = n_routed_experts, expert = expert, name = experts)       # eq. 12
  if n_shared_experts > 0:
    y = y + SwiGLU(x, intermediate_size = n_shared_experts * moe_intermediate_size, name = shared_experts)

  collect balance = sequence_balance_loss(affinity, k = num_experts_per_tok)                     # eq. 17 to 20
  collect load = expert_load(topk_indices, count = n_routed_experts)
  return y

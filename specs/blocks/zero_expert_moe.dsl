block ZeroExpertMoE(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  """Experts of which some compute nothing, so that tokens get as much computation as they need: LongCat-Flash (arXiv 2509.01322), section 2.1.1.

  The gate is that of DeepSeek-V2 with a balancing bias, which zero experts have, too: it decides how many of a token's experts compute.
  """
  params hidden_size, n_routed_experts, num_experts_per_tok, moe_intermediate_size
  params zero_expert_num = 0                                   # experts that give back what they are given
  params norm_topk_prob = false, routed_scaling_factor = 1.0
  slots expert = SwiGLU(intermediate_size = moe_intermediate_size)

  require zero_expert_num >= 0, "zero_expert_num ({zero_expert_num}) is negative", "0: every expert computes"
  let n_experts = n_routed_experts + zero_expert_num
  require num_experts_per_tok <= n_experts, "{num_experts_per_tok} experts cannot be chosen from {n_experts}", "lower num_experts_per_tok to at most {n_experts}"

  affinity = softmax(linear(float32(x), to = n_experts, name = router.classifier))
  topk_indices, weight = topk_groups(affinity, k = num_experts_per_tok, bias = router.e_score_correction_bias, n_group = 1, topk_group = 1, group_score = "max", normalize = norm_topk_prob, scale = routed_scaling_factor)
  y = experts(x, topk_indices, weight, count = n_routed_experts, identity = zero_expert_num, expert = expert, name = experts) # eq. 1

  collect balance = sequence_balance_loss(affinity, k = num_experts_per_tok)
  collect load = expert_load(topk_indices, count = n_experts)
  return y

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let n_experts = 6
  let k = 2
  let n_routed = 4
  affinity = softmax(linear(float32(x), to = n_experts, name = gate))
  index, weight = topk_groups(affinity, k = k, n_group = 1, topk_group = 1, group_score = "max", normalize = false, scale = 1)
  y = experts(x, index, weight, count = n_routed, expert = SwiGLU(intermediate_size = 4), name = experts)
  z = experts(x, index, weight, count = n_routed, identity = -2, expert = SwiGLU(intermediate_size = 4), name = experts)
  return y + z

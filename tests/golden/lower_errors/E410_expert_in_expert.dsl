block Inner(z: [token, hidden_size]) -> [token, hidden_size]:
  params hidden_size
  let n = hidden_size // 4
  return experts(z, z, z, count = n, expert = SwiGLU(intermediate_size = 4), name = inner)

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let n = hidden_size // 4
  score = softmax(linear(float32(x), to = n, name = gate))
  route, weight = topk_groups(score, k = n, n_group = 1, topk_group = 1, group_score = "max", normalize = true, scale = 1)
  return experts(x, route, weight, count = n, expert = Inner, name = experts)

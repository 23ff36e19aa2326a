block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  score = sigmoid(linear(float32(x), to = hidden_size, name = gate))
  route, weight = topk_groups(score, k = hidden_size, n_group = 1, topk_group = 1, group_score = "best", normalize = true, scale = 1)
  return x

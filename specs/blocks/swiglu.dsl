block SwiGLU(x: [.., hidden_size]) -> [.., hidden_size]:
  """Gated feed-forward network: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""
  params hidden_size, intermediate_size

  gate = silu(linear(x, to = intermediate_size, name = gate_proj))
  up = linear(x, to = intermediate_size, name = up_proj)
  return linear(gate * up, to = hidden_size, name = down_proj)

block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let q_lora_rank = 12
  let kv_lora_rank = 8
  c_q = linear(x, to = q_lora_rank, name = q_a_proj)
  c_kv = linear(x, to = kv_lora_rank, name = kv_a_proj)
  return linear(c_kv, from = q_lora_rank, to = hidden_size, name = q_b_proj)

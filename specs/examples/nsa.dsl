extern nsa(q: [batch, seq, heads, dim], k: [batch, context, groups, dim], v: [batch, context, groups, value], gates: [batch, seq, heads, branches]) -> [batch, seq, heads, value]:
  """Attention to compressed blocks, to selected blocks and to a window, weighed by gates (arXiv 2502.11089)."""
  params block = 4, top = 2, window = 4
  file = "nsa.py"
  per = "sequence"
  flops = 2 * heads * (dim + value) * (context / 2 / block + top * block + window)

block NativeSparseAttention(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Grouped-query attention whose keys are selected in blocks (arXiv 2502.11089)."""
  params hidden_size, num_attention_heads, num_key_value_heads, head_dim, rope_theta = 10000
  params nsa_block = 4, nsa_top = 2, nsa_window = 4            # tokens of a block; blocks; tokens of the window

  require num_attention_heads % num_key_value_heads == 0, "num_attention_heads ({num_attention_heads}) is not a multiple of num_key_value_heads ({num_key_value_heads})", "each head of keys serves an equal number of heads of queries"
  require nsa_block > 0 and nsa_top > 0 and nsa_window > 0, "nsa_block ({nsa_block}), nsa_top ({nsa_top}) and nsa_window ({nsa_window}) are each at least 1", "a query sees its own block and itself"

  let branches = 3
  q = unflatten(linear(x, to = num_attention_heads * head_dim, name = q_proj), num_attention_heads, head_dim)
  k = unflatten(linear(x, to = num_key_value_heads * head_dim, name = k_proj), num_key_value_heads, head_dim)
  v = unflatten(linear(x, to = num_key_value_heads * head_dim, name = v_proj), num_key_value_heads, head_dim)
  gates = sigmoid(unflatten(linear(x, to = num_attention_heads * branches, name = gate_proj), num_attention_heads, branches))
  cos, sin = rope_table(position, dim = head_dim, theta = rope_theta)
  q = rotate(q, cos, sin)
  k = rotate(k, cos, sin)
  k, v = cache(k, v)
  o = nsa(q, k, v, gates, block = nsa_block, top = nsa_top, window = nsa_window)
  return linear(flatten(o, num_attention_heads, head_dim), to = hidden_size, name = o_proj)

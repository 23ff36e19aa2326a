block DecoderLayer(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """One layer: attention, then a feed-forward network, each on the normed input and added to it."""
  params hidden_size, rms_norm_eps = 1e-6
  params residual_multiplier = 1                               # of what each of them adds
  slots attention, feed_forward

  if residual_multiplier == 1:
    x = x + attention(rms_norm(x, eps = rms_norm_eps, name = input_layernorm), position, name = self_attn)
    x = x + feed_forward(rms_norm(x, eps = rms_norm_eps, name = post_attention_layernorm), name = mlp)
  else:
    x = x + residual_multiplier * attention(rms_norm(x, eps = rms_norm_eps, name = input_layernorm), position, name = self_attn)
    x = x + residual_multiplier * feed_forward(rms_norm(x, eps = rms_norm_eps, name = post_attention_layernorm), name = mlp)
  return x

block ShortcutLayer(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Two layers in one, and experts beside the second: LongCat-Flash (arXiv 2509.01322), section 2.1.2.

  What the experts make of the first half's normed state is added at the end, so that tokens travel to them and back while the second half is computed.
  """
  params hidden_size, rms_norm_eps = 1e-6
  slots attention, feed_forward, mixture

  x = x + attention(rms_norm(x, eps = rms_norm_eps, name = input_layernorm.{0}), position, name = self_attn.{0})
  normed = rms_norm(x, eps = rms_norm_eps, name = post_attention_layernorm.{0})
  shortcut = mixture(normed, name = mlp)
  x = x + feed_forward(normed, name = mlps.{0})
  x = x + attention(rms_norm(x, eps = rms_norm_eps, name = input_layernorm.{1}), position, name = self_attn.{1})
  x = x + feed_forward(rms_norm(x, eps = rms_norm_eps, name = post_attention_layernorm.{1}), name = mlps.{1})
  return x + shortcut

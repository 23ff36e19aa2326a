block MTP(h: [batch, seq, hidden_size], embedded: [batch, seq, hidden_size], position: i64[batch, seq]) -> (h: [batch, seq, hidden_size], normed: [batch, seq, hidden_size]):
  """Multi-token prediction module: DeepSeek-V3 report, section 2.2, equations 21 to 23.

  Position i holds the state of token i of the depth before and the embedding of the token that
  follows it at this depth. `normed` goes to the shared head, `h` to the next depth.
  """
  params hidden_size, rms_norm_eps = 1e-6
  params mtp_concat = "embedding_first"                        # the released weights; the report has hidden_first
  params mtp_hidden_state = "after_norm"                       # or before_norm: which state goes to the next depth
  slots attention, feed_forward, layer = DecoderLayer

  require mtp_concat == "embedding_first" or mtp_concat == "hidden_first", "mtp_concat is neither embedding_first nor hidden_first", "the released weights need embedding_first"
  require mtp_hidden_state == "after_norm" or mtp_hidden_state == "before_norm", "mtp_hidden_state is neither after_norm nor before_norm", "transformers uses after_norm"

  let both = 2 * hidden_size
  embedded = rms_norm(embedded, eps = rms_norm_eps, name = enorm)
  h = rms_norm(h, eps = rms_norm_eps, name = hnorm)
  if mtp_concat == "embedding_first":
    h = concat(embedded, h, into = both)                                                         # eq. 21
  else:
    h = concat(h, embedded, into = both)                                                         # eq. 21
  h = linear(h, to = hidden_size, name = eh_proj)
  h = layer(h, position, attention = attention, feed_forward = feed_forward)                     # eq. 22
  normed = rms_norm(h, eps = rms_norm_eps, name = shared_head.norm)
  if mtp_hidden_state == "after_norm":
    h = normed
  return h, normed

block CausalLM(tokens: i64[batch, seq], labels: i64[batch, seq], position: i64[batch, seq], mtp_weight: f32[], balance_alpha: f32[]):
  """The language model around the layers: embedding, layers, norm, head, prediction of further tokens, losses.

  labels[i] is the token that follows tokens[i]; -100 is left out of the loss.
  """
  params vocab_size, hidden_size, rms_norm_eps = 1e-6
  params tie_word_embeddings = false, document_mask = false    # the mask is that of `train`
  params mtp_hidden_state = "after_norm"                       # which state of the main model goes to the first module
  params indexer_loss_weight = 0                               # of sparse attention: of what trains its choice of keys
  params embedding_multiplier = 1, logits_scaling = 1          # times the one, and divided by the other before the head
  slots layers, mtp

  let num_hidden_layers = count(layers)
  h = embedding(tokens, rows = vocab_size, to = hidden_size, name = model.embed_tokens)
  if embedding_multiplier != 1:
    h = h * embedding_multiplier
  repeat layer, index in layers:
    h = layer(h, position, name = model.layers.{index})
  normed = rms_norm(h, eps = rms_norm_eps, name = model.norm)
  logits = linear(normed if logits_scaling == 1 else normed / logits_scaling, to = vocab_size, name = model.embed_tokens if tie_word_embeddings else lm_head)
  valid = count_labels(labels)
  main = cross_entropy(logits, labels) / valid
  total = main
  if mtp_hidden_state == "after_norm":
    h = normed

  for module, depth in mtp:
    h = drop_last(h, along = seq, count = 1)
    later_tokens = drop_first(tokens, along = seq, count = depth)
    later_position = drop_last(position, along = seq, count = depth) if document_mask else drop_first(position, along = seq, count = depth)
    embedded = embedding(later_tokens, rows = vocab_size, to = hidden_size, name = model.embed_tokens)
    if embedding_multiplier != 1:
      embedded = embedded * embedding_multiplier
    h, normed = module(h, embedded, later_position, name = model.layers.{num_hidden_layers + depth - 1})
    later_logits = linear(normed if logits_scaling == 1 else normed / logits_scaling, to = vocab_size, name = model.embed_tokens if tie_word_embeddings else lm_head)  # eq. 23
    later_loss = cross_entropy(later_logits, drop_first(labels, along = seq, count = depth)) / valid             # eq. 24
    total = total + mtp_weight * later_loss / count(mtp)                                         # eq. 25
    output mtp_logits = later_logits
    output mtp = later_loss
    alias model.layers.{num_hidden_layers + depth - 1}.embed_tokens.weight = model.embed_tokens.weight
    if tie_word_embeddings:
      alias model.layers.{num_hidden_layers + depth - 1}.shared_head.head.weight = model.embed_tokens.weight
    else:
      alias model.layers.{num_hidden_layers + depth - 1}.shared_head.head.weight = lm_head.weight

  if indexer_loss_weight > 0:
    total = total + indexer_loss_weight * collected(indexer)
  balance = collected(balance)
  output logits = logits
  output main = main
  output balance = balance
  output total = total + balance_alpha * balance
  output load = collected(load)

"""The choice of one token from one row of logits.

Chance is a function of seed and place: noise of the Gumbel distribution, added to the logits, so
that the largest sum is a sample of the softmax. A choice depends on its own row alone, can be made
again, and is the same for a draft and for the token that the draft foretold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..normal import tensor_key, uniform
from .request import Sampling, Token


def choose(
    logits: Tensor,
    sampling: Sampling,
    prompt: Sequence[int],
    output: Sequence[int],
    allowed: Tensor | None = None,
) -> int:
    """The token after `prompt` and `output`, from its logits [vocab].

    Only of those that a grammar allows, bool [vocab], where there is one. In the order of the
    fields of `Sampling`: bias, penalties, temperature, top-k, top-p, min-p, chance. Of equal scores
    the lowest id.
    """
    if sampling.temperature == 0 and not _adjusts(sampling) and allowed is None:
        return int(logits.argmax())
    score = logits.detach().double().cpu()
    if allowed is not None:
        score = score.masked_fill(~allowed, -math.inf)
    score = _adjusted(score, sampling, prompt, output)
    if sampling.temperature == 0:
        return int(score.argmax())
    # The best is 0, so that no temperature makes it infinite.
    score = _filtered((score - score.max()) / sampling.temperature, sampling)
    place = len(prompt) + len(output)
    noise = uniform(len(score), tensor_key(sampling.seed, f"token {place}"))
    return int((score - noise.log().neg_().log_()).argmax())


def _adjusts(sampling: Sampling) -> bool:
    """Whether scores are other ones than the logits."""
    penalties = sampling.presence_penalty or sampling.frequency_penalty
    repeats = sampling.repetition_penalty != 1
    return bool(sampling.logit_bias or sampling.min_tokens or penalties or repeats)


def _adjusted(
    score: Tensor, sampling: Sampling, prompt: Sequence[int], output: Sequence[int]
) -> Tensor:
    if len(output) < sampling.min_tokens and sampling.end_tokens:
        later = score.clone()
        later[list(sampling.end_tokens)] = -math.inf
        if later.isfinite().any():  # a grammar may allow nothing but the end
            score = later
    for id, bias in sampling.logit_bias.items():
        score[id] += bias
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *output}))
        by = sampling.repetition_penalty
        score[seen] = torch.where(score[seen] > 0, score[seen] / by, score[seen] * by)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        count = torch.bincount(torch.tensor(output), minlength=len(score))
        score -= sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
    return score


def _filtered(score: Tensor, sampling: Sampling) -> Tensor:
    """Scores with -inf for tokens that are left out; the most likely one never is."""
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
        return score
    ordered, ids = score.sort(descending=True, stable=True)
    kept = sampling.top_k or len(score)
    probability = ordered[:kept].softmax(0)
    before = probability.cumsum(0) - probability
    keep = (before < sampling.top_p) & (probability >= sampling.min_p * probability[0])
    keep[0] = True
    out = torch.full_like(score, -math.inf)
    chosen = ids[:kept][keep]
    out[chosen] = score[chosen]
    return out


def with_logprobs(logits: Tensor, id: int, logprobs: int | None) -> Token:
    """A chosen token, with log-probabilities of the model's own logits [vocab] if asked for."""
    if logprobs is None:
        return Token(id)
    logprob = logits.detach().float().cpu().log_softmax(0)
    best, ids = logprob.sort(descending=True, stable=True)
    pairs = zip(ids[:logprobs].tolist(), best[:logprobs].tolist(), strict=True)
    return Token(id, float(logprob[id]), tuple(pairs))

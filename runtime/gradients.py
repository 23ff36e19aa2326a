"""Derivatives of the operators, as the generated `backward` methods call them.

The first argument is the gradient of a result; what comes back are gradients of operands. Each
is the derivative of the function of that name in `functional`, where shapes are explained. Unless
a docstring says otherwise, sums are taken in float32 (in float64 for float64 operands).
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from . import functional as F
from . import matmul
from .functional import IGNORED_LABEL


def linear_input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """`dy W` for y = x W^T: dy [..., out], weight [out, in]: [..., in]."""
    return matmul.product(dy, weight.t())


def linear_weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """`dy^T x` summed over all tokens: dy [..., out], x [..., in]: [out, in]."""
    return matmul.product(_rows(dy).t(), _rows(x).t())


def _rows(x: Tensor) -> Tensor:
    """[..., n] as [rows, n], of which one dimension is one."""
    return x.reshape(-1, x.shape[-1])


def grouped_linear_input_grad(dy: Tensor, offs: Tensor, weight: Tensor) -> Tensor:
    """`dy W_e` for the rows of each expert: dy [slots, out], weight [experts, out, in]."""
    return matmul.grouped_product(dy, offs, weight.transpose(-1, -2))


def grouped_linear_weight_grad(dy: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """`dy^T x` over the rows of each expert: [experts, out, in], zeros where it has none."""
    return matmul.grouped_outer(dy, x, offs)


def grouped_parameter_grad(d: Tensor, offs: Tensor) -> Tensor:
    """The rows of d [slots, n] summed for each expert: [experts, n], zeros where it has none."""
    sums = torch.segment_reduce(F.wide(d), "sum", lengths=F.rows_of(offs), initial=0)
    return sums.to(d.dtype)


def embedding_grad(d: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """The rows of d [..., hidden] summed by token, in their order: [rows, hidden]."""
    # `index_add_` adds on a GPU in the order in which threads come.
    table: Tensor = torch.ops.aten.embedding_dense_backward(
        F.wide(d.flatten(0, -2)), tokens.flatten(), rows, -1, False
    )
    return table.to(d.dtype)


def rms_norm_grad(d: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of x and of the weight: with r = 1 / sqrt(mean(x^2) + eps) and g = w d,
    dx = r (g - x r^2 mean(g x)), dw = sum(d x r)."""
    rows, wide_d = _rows(F.wide(x)), _rows(F.wide(d))
    r = F.inverse_rms(rows, eps)
    products = wide_d * rows
    dw = torch.mv(products.t(), r.squeeze(-1))
    mean = torch.mv(products, weight.to(rows.dtype)).div_(x.shape[-1]).unsqueeze(-1)
    # In place: on the CPU the time is that of writing new memory.
    dx = (
        torch.mul(wide_d, weight, out=products)
        .mul_(r)
        .addcmul_(rows, r.pow(3).mul_(mean), value=-1)
    )
    return dx.view(x.shape).to(x.dtype), dw.to(x.dtype)


def add_rms_norm_grad(
    d_total: Tensor, d: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Of each summand, `d_total` and what `rms_norm_grad` gives; and of the weight."""
    dx, dw = rms_norm_grad(d, total, weight, eps)
    return d_total + dx, dw


def layer_norm_grad(
    d: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, of the weight and of the bias: with n the normed x, r = 1 / sqrt(var(x) + eps) and
    g = w d, dx = r (g - mean(g) - n mean(g n)), dw = sum(d n), db = sum(d)."""
    rows, wide_d = _rows(F.wide(x)), _rows(F.wide(d))
    r = torch.rsqrt(rows.var(-1, correction=0, keepdim=True) + eps)
    normed = (rows - rows.mean(-1, keepdim=True)) * r
    g = wide_d * weight
    dx = r * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    dw, db = (wide_d * normed).sum(0), wide_d.sum(0)
    return dx.view(x.shape).to(x.dtype), dw.to(x.dtype), db.to(x.dtype)


def silu_grad(d: Tensor, x: Tensor) -> Tensor:
    """`d s (1 + x (1 - s))` with s = sigmoid(x)."""
    dx: Tensor = torch.ops.aten.silu_backward(d, x)
    return dx


def swiglu_grad(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up, for silu(gate) up."""
    return silu_grad(d * up, gate), d * F.silu(gate)


def swiglu_grad_joined(d: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Of gate and up [.., n], concatenated, for silu(gate) up: [.., 2 n]."""
    return torch.cat(swiglu_grad(d, gate, up), -1)


def join_rotated_grad(d: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """From gradients of keys, d [.., heads, k + r], as `join_rotated` made them, and of values.

    Gives those of what each head had of both, concatenated, and of what all heads share,
    turned back: [.., heads, k + v], [.., r].
    """
    own, shared = d.split([d.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], -1)
    return torch.cat([own, d_v], -1), F.rotate(shared.sum(-2), cos, -sin)


def sigmoid_grad(d: Tensor, y: Tensor) -> Tensor:
    """`d y (1 - y)` from the result y."""
    dx: Tensor = torch.ops.aten.sigmoid_backward(d, y)
    return dx


def gelu_grad(d: Tensor, x: Tensor) -> Tensor:
    """`d (P(x) + x p(x))`, P the distribution function of N(0, 1) and p its density."""
    dx: Tensor = torch.ops.aten.gelu_backward(d, x)
    return dx


def gelu_tanh_grad(d: Tensor, x: Tensor) -> Tensor:
    """`d` times the slope of `gelu_tanh` at x."""
    dx: Tensor = torch.ops.aten.gelu_backward(d, x, approximate="tanh")
    return dx


def relu_grad(d: Tensor, y: Tensor) -> Tensor:
    """`d` where the result y is above 0."""
    dx: Tensor = torch.ops.aten.threshold_backward(d, y, 0)
    return dx


def relu_squared_grad(d: Tensor, x: Tensor) -> Tensor:
    """`2 d max(x, 0)`."""
    return 2 * d * torch.relu(x)


def tanh_grad(d: Tensor, y: Tensor) -> Tensor:
    """`d (1 - y^2)` from the result y."""
    dx: Tensor = torch.ops.aten.tanh_backward(d, y)
    return dx


def softplus_grad(d: Tensor, x: Tensor) -> Tensor:
    """`d sigmoid(x)`."""
    return d * torch.sigmoid(x)


def exp_grad(d: Tensor, y: Tensor) -> Tensor:
    """`d y` from the result y."""
    return d * y


def log_grad(d: Tensor, x: Tensor) -> Tensor:
    """`d / x`."""
    return d / x


def sqrt_grad(d: Tensor, y: Tensor) -> Tensor:
    """`d / (2 y)` from the result y."""
    return d / (2 * y)


def softmax_grad(d: Tensor, y: Tensor) -> Tensor:
    """`y (d - sum(d y))` from the result y."""
    wide_d, wide_y = F.wide(d), F.wide(y)
    product = wide_d * wide_y
    return (product - wide_y * product.sum(-1, keepdim=True)).to(d.dtype)


def attention_saving(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    mask: F.Mask | None = None,
    softcap: float | None = None,
    selected: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the float32 logarithm of each query's sum of exponentials.

    The latter is [batch, query, heads]. Where torch's kernel does not give it (other devices than
    the CPU, no tokens, capped scores, sinks), it is zeros that are not read: `attention_grad` does
    without.
    """
    seen = F.attention_mask(q.shape[1], k.shape[1], q.device, window, mask, selected)
    return _attend_saving(q, k, v, seen, scale, softcap, sinks)


def attention_grad(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None = None,
    mask: F.Mask | None = None,
    softcap: float | None = None,
    selected: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Of q, k and v, and of `sinks` if there are any, from what `attention_saving` gave; the scores
    are made once more."""
    seen = F.attention_mask(q.shape[1], k.shape[1], q.device, window, mask, selected)
    return _attend_grad(d, q, k, v, o, lse, seen, scale, softcap, sinks)


def document_attention_saving(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    scale: float,
    window: int | None = None,
    mask: F.Mask | None = None,
    softcap: float | None = None,
    selected: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`document_attention`, and what `attention_saving` gives besides."""
    seen = F.document_mask(position, window, mask, selected)
    return _attend_saving(q, k, v, seen, scale, softcap, sinks)


def document_attention_grad(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None = None,
    mask: F.Mask | None = None,
    softcap: float | None = None,
    selected: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Of q, k and v, and of `sinks` if there are any, from what `document_attention_saving`
    gave."""
    seen = F.document_mask(position, window, mask, selected)
    return _attend_grad(d, q, k, v, o, lse, seen, scale, softcap, sinks)


def _attend_saving(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of as many queries as keys, to the keys `seen`; to all that do not come later without."""
    if not _has_flash(q) or softcap is not None or sinks is not None:
        lse = torch.zeros(q.shape[:-1], dtype=torch.float32, device=q.device)
        return _saved(F.attend(q, k, v, seen, scale, seen is None, softcap, sinks), q), lse
    padded = F.equally_wide(q, *_for_each_head(q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *padded, 0.0, seen is None, attn_mask=_bias(seen, q.dtype), scale=scale
    )
    return _saved(out.transpose(1, 2)[..., : v.shape[-1]], q), lse.transpose(1, 2)


def _saved(out: Tensor, q: Tensor) -> Tensor:
    """Without what values were padded with to the width of queries, which a view would keep."""
    return out.contiguous() if out.shape[-1] < q.shape[-1] else out


def _attend_grad(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    seen: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, ...]:
    if softcap is not None or sinks is not None or q.numel() == 0:
        return _attend_grad_by_autograd(d, q, k, v, seen, scale, softcap, sinks)
    if not _has_flash(q):
        return _attend_grad_by_products(d, q, k, v, o, None, seen, scale, F.wide_dtype(q))
    if q.dtype is torch.bfloat16 and q.shape[1] <= SHORT:
        return _attend_grad_by_products(d, q, k, v, o, lse, seen, scale, q.dtype)
    wide = F.equally_wide(q, *_for_each_head(q, k, v))
    padded_d, padded_o = F.equally_wide(d, o, wide[0].transpose(1, 2))[:2]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        padded_d,
        *wide,
        padded_o,
        lse.transpose(1, 2),
        0.0,
        seen is None,
        attn_mask=_bias(seen, q.dtype),
        scale=scale,
    )
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    dk, dv = (g.unflatten(2, (k.shape[2], -1)).sum(3) for g in (dk, dv))
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _bias(seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What torch's CPU kernel adds to scores: 0, or -inf for keys that are not seen."""
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


SHORT = 256
"""Up to so many tokens, gradients of bfloat16 attention by whole products of a sequence at a time
take about half of the time of torch's kernel, whose products are small (8 heads of 96: 30 ms
against 57); for 1024, half of whose products are left out, 1.7 times."""


SCORES = 2**26
"""So many scores are in memory at a time, of as many heads as they are: 256 MiB in float32."""


def _attend_grad_by_products(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    seen: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the probabilities: dV = P^T d, dS = P (d V^T - sum(d o)), dQ = dS K, dK = dS^T Q.

    Products are in `dtype`. Every sum has one order; those of torch's own kernels for GPUs have
    none.
    """
    kv_heads, (keys, values) = k.shape[2], _for_each_head(q, k, v)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)
    causal = seen is None
    if seen is None:
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    hidden = ~seen.expand(len(q), 1, *seen.shape[-2:])
    heads = max(1, SCORES // max(1, hidden[0].numel()))
    for b in range(len(q)):
        for first in range(0, q.shape[2], heads):
            part = b, slice(None), slice(first, first + heads)
            qh, kh, vh, dh, oh = (
                t[part].transpose(0, 1).to(dtype) for t in (q, keys, values, d, o)
            )
            score = F.wide(matmul.bmm(qh, kh.transpose(1, 2))).mul_(scale)
            if lse is None:
                level = score.masked_fill(hidden[b], -torch.inf).logsumexp(-1, keepdim=True)
            else:
                level = lse[part].t().unsqueeze(-1)
            p = score.sub_(level).exp_()
            p = p.tril_() if causal else p.masked_fill_(hidden[b], 0)
            share = (F.wide(dh) * oh).sum(-1, keepdim=True)
            ds = F.wide(matmul.bmm(dh, vh.transpose(1, 2))).sub_(share).mul_(p).mul_(scale)
            ds = ds.to(dtype)
            dq[part] = matmul.bmm(ds, kh).transpose(0, 1)
            dk[part] = matmul.bmm(ds.transpose(1, 2), qh).transpose(0, 1)
            dv[part] = matmul.bmm(p.to(dtype).transpose(1, 2), dh).transpose(0, 1)
    return dq, *(g.unflatten(2, (kv_heads, -1)).sum(3) for g in (dk, dv))


def _has_flash(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.numel() > 0


def _for_each_head(q: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
    """Keys and values once for each head of queries, which torch's CPU kernel wants."""
    times = q.shape[2] // shared[0].shape[2]
    return tuple(t.repeat_interleave(times, 2) if times > 1 else t for t in shared)


def attention_varlen_saving(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attention_varlen`, and the logarithm of each query's sum of exponentials [token, heads];
    zeros for tokens after the last sequence."""
    seen, none = F.varlen_mask(len(q), len(k), cu_seqlens_q, cu_seqlens_k)
    times, levels = q.shape[1] // k.shape[1], []
    for head in range(q.shape[1]):  # the scores of all heads at once may be too many
        score = F.wide(q[:, head]) @ F.wide(k[:, head // times]).t() * scale
        levels.append(score.masked_fill(~seen, -torch.inf).logsumexp(-1).masked_fill(none, 0))
    o = F.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen, scale)
    return o, torch.stack(levels, -1)


def attention_varlen_grad(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v of packed sequences; zeros outside of all of them."""
    seen, none = F.varlen_mask(len(q), len(k), cu_seqlens_q, cu_seqlens_k)
    d = d.masked_fill(none[:, None, None], 0)
    d, q, k, v, o, lse = (t[None] for t in (d, q, k, v, o, lse))
    wide = F.wide_dtype(q)
    dq, dk, dv = _attend_grad_by_products(d, q, k, v, o, lse, seen, scale, wide)
    return dq[0], dk[0], dv[0]


def _attend_grad_by_autograd(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v, sinks) if t is not None]
        out = F.attend(
            leaves[0], leaves[1], leaves[2], seen, scale, seen is None, softcap, *leaves[3:]
        )
        return torch.autograd.grad(out, leaves, d)


def indexer_loss_grad(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weight: Tensor,
    selected: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Of the indexer's queries, keys and weights."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (index_q, index_k, weight)]
        loss = F.indexer_loss(q, k, leaves[0], leaves[1], leaves[2], selected, scale)
        return torch.autograd.grad(loss, leaves, d)


def topk_groups_grad(
    d: Tensor, score: Tensor, topk_indices: Tensor, *, normalize: bool, scale: float
) -> Tensor:
    """Of the scores [..., experts], of which only the chosen ones have a gradient."""
    part = d * scale
    if normalize:
        chosen = score.gather(-1, topk_indices)
        total = chosen.sum(-1, keepdim=True) + F.TINY
        part = part / total - (part * chosen).sum(-1, keepdim=True) / total.square()
    return torch.zeros_like(score).scatter(-1, topk_indices, part)


def gate_grad(
    d: Tensor,
    d_affinity: Tensor,
    affinity: Tensor,
    topk_indices: Tensor,
    *,
    scoring: F.Scoring,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Of x, from the gradients of the weights d [..., k] and of the affinities [..., experts]."""
    chosen = topk_groups_grad(d, affinity, topk_indices, normalize=normalize, scale=scale)
    through = sigmoid_grad if scoring == "sigmoid" else softmax_grad
    return through(d_affinity + chosen, affinity)


def identity_weight_grad(d: Tensor, topk_indices: Tensor, count: int) -> Tensor:
    """`d` [..., 1] for the weights of experts from `count` on, 0 for others: [..., k]."""
    return torch.where(topk_indices >= count, d, 0)


def permute_grad(d: Tensor, sort_indices: Tensor, topk_indices: Tensor) -> Tensor:
    """Rows d [slots, hidden] back at their tokens, summed: [..., hidden]."""
    ones = d.new_ones(topk_indices.shape).flatten(0, -2)
    return F.sum_choices(d, sort_indices, ones).view(*topk_indices.shape[:-1], d.shape[-1])


def unpermute_grad(
    d: Tensor, y: Tensor, sort_indices: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the rows y [slots, hidden] and of the weights [..., k]."""
    token = torch.div(sort_indices, weight.shape[-1], rounding_mode="floor")
    rows = d.flatten(0, -2).index_select(0, token)
    dots = (F.wide(rows) * y).sum(-1).to(weight.dtype)
    dy = rows.mul_(weight.flatten()[sort_indices].to(y.dtype).unsqueeze(-1))
    return dy, dots.new_zeros(weight.numel()).scatter_(0, sort_indices, dots).view(weight.shape)


def sequence_balance_loss_grad(d: Tensor, score: Tensor, k: int) -> Tensor:
    """Of the scores [batch, seq, experts], through P_i only: counting has no gradient."""
    batch, seq, experts = score.shape
    frequency = F.chosen(score, k).mean(-2, keepdim=True) * (experts / k)
    total = score.sum(-1, keepdim=True) + F.TINY
    inner = (frequency * score).sum(-1, keepdim=True) / total
    return (frequency - inner) / total * (d / (batch * seq))


def cross_entropy_grad(d: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """`d (softmax(logits) - onehot(label))`, 0 where the label does not count."""
    return _scores_grad(torch.softmax(F.wide(logits), dim=-1), labels).mul_(d).to(logits.dtype)


def _scores_grad(p: Tensor, labels: Tensor) -> Tensor:
    """`p - onehot(label)`, 0 where the label does not count, in place of the probabilities p."""
    counts = (labels != IGNORED_LABEL).unsqueeze(-1)
    index = labels.unsqueeze(-1).where(counts, 0)
    return p.scatter_add_(-1, index, p.new_full((), -1.0).expand(index.shape)).mul_(counts)


CHUNK = 2**22
"""Scores that `linear_cross_entropy` holds at a time: few enough to stay in a cache."""


def linear_cross_entropy(
    x: Tensor, labels: Tensor, weight: Tensor, *, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`cross_entropy` of the scores x W^T, without ever holding all of them.

    x [..., hidden], labels [...], weight [vocab, hidden]. Since the scores are gone afterwards, the
    gradients of x and of the weight are made here, for a gradient of 1; None without `gradients`.
    """
    rows, label = x.flatten(0, -2), labels.flatten()
    loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    dx = torch.empty_like(rows) if gradients else None
    # Added up in float32: in bfloat16 the sum of some hundred terms loses its low bits.
    dw = torch.zeros_like(weight, dtype=loss.dtype) if gradients else None
    size = max(1, CHUNK // weight.shape[0])
    for start in range(0, len(rows), size):
        part, wanted = rows[start : start + size], label[start : start + size]
        logits = matmul.product(part, weight)
        log_p = torch.log_softmax(F.wide(logits), dim=-1)
        loss += torch_f.nll_loss(log_p, wanted, ignore_index=IGNORED_LABEL, reduction="sum")
        if dx is not None and dw is not None:
            d = _scores_grad(log_p.exp_(), wanted).to(x.dtype)
            dx[start : start + size] = matmul.product(d, weight.t())
            dw += matmul.product(d.t(), part.t())
    if dx is None or dw is None:
        return loss, None, None
    return loss, dx.view(x.shape), dw.to(x.dtype)


def pad_first(x: Tensor, dim: int, count: int) -> Tensor:
    """`count` zeros before x along a dimension."""
    zeros = x.new_zeros(*x.shape[:dim], count, *x.shape[dim + 1 :])
    return torch.cat([zeros, x], dim=dim)


def pad_last(x: Tensor, dim: int, count: int) -> Tensor:
    """Pads x with `count` zeros at the end of a dimension."""
    zeros = x.new_zeros(*x.shape[:dim], count, *x.shape[dim + 1 :])
    return torch.cat([x, zeros], dim=dim)

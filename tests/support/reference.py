"""The models of transformers: with random weights, under published names, and their losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_layers import MtpModel

from dsl.hf import unread_tensors
from tests.support.configs import Case

NAMES = {
    "deepseek_v3": "DeepseekV3",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v32": "DeepseekV32",
    "dots1": "Dots1",
    "glm4_moe": "Glm4Moe",
    "longcat_flash": "LongcatFlash",
    "glm4_moe_lite": "Glm4MoeLite",
    "minicpm3": "MiniCPM3",
}
"""What transformers' classes of a kind of model begin with."""


class Reference:
    """A model of transformers, with its MTP modules if it has any."""

    def __init__(self, case: Case, seed: int) -> None:
        make_config, make_model = (
            getattr(transformers, f"{NAMES[case.model_type]}{kind}")
            for kind in ("Config", "ForCausalLM")
        )
        config = make_config(
            **case.config, attn_implementation="eager", experts_implementation="eager"
        )
        self.case, self.config, self.model = case, config, make_model(config).eval()
        self.mtp = MtpModel(self.model, case.depth).eval() if case.depth else None
        generator = torch.Generator().manual_seed(seed)
        for module in (self.model, self.mtp):
            if module is not None:
                randomize(module, generator)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(published prefix, module) of the model and of each MTP module."""
        yield "", self.model
        for k, layer in enumerate(self.mtp.layers if self.mtp else ()):
            yield f"model.layers.{self.config.num_hidden_layers + k}.", layer

    def published(self, *, grad: bool = False) -> dict[str, Tensor]:
        """Weights, or their gradients, under the names that checkpoints use."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in self.modules():
            values = {n: p.grad if grad else p.detach() for n, p in module.named_parameters()}
            if not grad:
                values |= {n: b for n, b in module.named_buffers() if n.endswith("_bias")}
            tensors |= {prefix + name: t for name, t in _split_experts(values) if t is not None}
        return self._read(tensors)

    def _read(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without what transformers makes and saves, and nobody reads."""
        unread = {
            n for names in unread_tensors(self.config.to_dict(), tensors).values() for n in names
        }
        return {name: tensor for name, tensor in tensors.items() if name not in unread}

    def save(self, folder: Path) -> None:
        """As transformers saves it, and the MTP modules beside in the published layout."""
        self.model.save_pretrained(folder)
        saved = load_file(folder / "model.safetensors")
        weights = self._read(saved)
        if self.mtp is None and len(weights) == len(saved):
            return
        for name, tensor in self.published().items():
            weights.setdefault(name, tensor.clone().contiguous())
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        for prefix in (prefix for prefix, _ in self.modules() if prefix):
            weights[f"{prefix}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
            weights[f"{prefix}shared_head.head.weight"] = head.clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def logits(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores of the main model [batch, seq, vocab] and of each MTP depth k [.., seq - k, ..].

        Depth k receives at position i the state of depth k - 1 and the embedding of token i + k.
        """
        hidden = self.model.model(tokens).last_hidden_state
        scaling = getattr(self.config, "logits_scaling", 1)  # of MiniCPM, which has no MTP modules
        main, later = self.model.lm_head(hidden / scaling), []
        for k in range(1, self.case.depth + 1):
            assert self.mtp is not None
            position = torch.arange(k, tokens.shape[1]).unsqueeze(0)
            hidden = self.mtp.forward_layer(
                k - 1, hidden[:, :-1], position, None, input_ids=tokens[:, k:]
            )
            later.append(self.model.lm_head(hidden))
        return main, later

    def losses(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Main loss and that of each depth k, whose labels are k further; all over one count."""
        main, later = self.logits(tokens)
        valid = (labels != -100).sum()
        depths = [_nll(score, labels[:, k:]) / valid for k, score in enumerate(later, 1)]
        return _nll(main, labels) / valid, depths

    def balance(self, tokens: Tensor) -> float:
        """The sequence-wise balance loss, equations 17 to 20, summed over all gates."""
        parts = [part for _, part in self.modules()]
        gates = [m for part in parts for n, m in part.named_modules() if n.endswith("mlp.gate")]
        seen: list[Tensor] = []
        hooks = [g.register_forward_hook(lambda m, i, out: seen.append(out[0])) for g in gates]
        with torch.no_grad():
            self.logits(tokens)
        for hook in hooks:
            hook.remove()
        assert len(seen) == len(gates)
        sigmoid = self.case.model_type == "deepseek_v3"
        total = 0.0
        for router_logits in seen:
            score = router_logits.sigmoid() if sigmoid else router_logits.softmax(-1)
            for sequence in score.unflatten(0, (len(tokens), -1)):
                total += self._sequence_balance(sequence) / len(tokens)
        return total

    def _sequence_balance(self, score: Tensor) -> float:
        """One sequence: f_i counts the tokens that expert i is among the best of."""
        length, experts = score.shape
        active = self.config.num_experts_per_tok
        total = 0.0
        best = [set(row.topk(active).indices.tolist()) for row in score]
        for i in range(experts):
            f = experts / (active * length) * sum(i in chosen for chosen in best)
            p = (score[:, i] / score.sum(-1)).mean().item()
            total += f * p
        return total


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep activations near 1, norms away from 1, gate biases of both signs."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith(("embed_tokens", "shared_head")):
                continue  # those of an MtpModel are the main model's
            if p.dim() == 1:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0, p.shape[-1] ** -0.5 if p.numel() else 1, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(-0.4, 0.3, generator=generator)


def _split_experts(tensors: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor | None]]:
    """From transformers' names, where experts are fused, to those of checkpoints."""
    for name, tensor in tensors.items():
        name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith("mlp.experts") or tensor is None:
            yield name, tensor
            continue
        for i, part in enumerate(tensor):
            if kind == "gate_up_proj":
                gate, up = part.chunk(2)
                yield f"{prefix}.{i}.gate_proj.weight", gate
                yield f"{prefix}.{i}.up_proj.weight", up
            else:
                yield f"{prefix}.{i}.down_proj.weight", part


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over the labels that are not -100."""
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(chosen * (labels != -100)).sum()

"""A tiny DeepSeek-V3 as dslc would generate it, written by hand: one dense layer, one MoE layer,
one MTP depth; YaRN, two groups, one shared expert. Tests of runtime/ run it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime import functional as F
from runtime.cache import Cache
from runtime.config import Phase, Schedule, freeze
from runtime.model import LanguageModel, Loss, Output
from runtime.pages import Pages
from runtime.weights import Block, Joined, Stack, Tensors, normal, ones, zeros

CONFIG = freeze(
    {
        "params": {"vocab_size": 96},
        "sequence": {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1},
        "precision": {"policy": "bf16"},
        "train": {
            "loss": {
                "mtp_weight": Schedule((Phase(0.3, until=1000), Phase(0.1))),
                "balance_alpha": 0.01,
            }
        },
    }
)
STD = 0.1
SCALE = 0.264642258
"""24^-0.5 times the square of YaRN's 0.1 ln(4) + 1"""


def linear(out: int, in_: int) -> Tensors:
    return Tensors(weight=normal(out, in_, std=STD))


def gate_up(*shape: int) -> Joined:
    return Joined(gate_proj=normal(*shape, std=STD), up_proj=normal(*shape, std=STD))


def norm(size: int) -> Tensors:
    return Tensors(weight=ones(size))


class MLA(Block):
    """2 heads of 16 + 8 for queries and keys, 12 for values; ranks 24 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.q_a_proj_kv_a_proj_with_mqa = Joined(
            q_a_proj=normal(24, 64, std=STD), kv_a_proj_with_mqa=normal(32 + 8, 64, std=STD)
        )
        self.q_a_layernorm = norm(24)
        self.q_b_proj = linear(2 * 24, 24)
        self.kv_a_layernorm = norm(32)
        self.kv_b_proj = linear(2 * (16 + 12), 32)
        self.o_proj = linear(64, 2 * 12)

    def inputs(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rope = F.rope_table(
            position,
            dim=8,
            theta=10000.0,
            factor=4.0,
            original_max_position_embeddings=64,
            beta_fast=32,
            beta_slow=1,
        )
        c_q, kv = F.linear(x, self.q_a_proj_kv_a_proj_with_mqa.weight).split((24, 40), dim=-1)
        c_q = F.rms_norm(c_q, self.q_a_layernorm.weight, eps=1e-6)
        q = F.linear(c_q, self.q_b_proj.weight).unflatten(-1, (2, 24))
        q_nope, q_rope = q.split((16, 8), dim=-1)
        c_kv, k_rope = kv.split((32, 8), dim=-1)
        c_kv = F.rms_norm(c_kv, self.kv_a_layernorm.weight, eps=1e-6)
        return torch.cat((q_nope, F.rotate(q_rope, *rope)), -1), c_kv, F.rotate(k_rope, *rope)

    def outputs(self, q: Tensor, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        kv = F.linear(c_kv, self.kv_b_proj.weight).unflatten(-1, (2, 28))
        k_nope, v = kv.split((16, 12), dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(-1, -1, 2, -1)), -1)
        o = F.attention(q, k, v, scale=SCALE)
        return F.linear(o.flatten(-2), self.o_proj.weight)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return self.outputs(*self.inputs(x, position))

    def decode(self, x: Tensor, position: Tensor, cache: Cache | Pages) -> Tensor:
        q, c_kv, k_rope = self.inputs(x, position)
        c_kv, k_rope = cache.append(self, c_kv=c_kv, k_rope=k_rope)
        q_nope, q_rope = q.split((16, 8), dim=-1)
        weight = self.kv_b_proj.weight
        q_latent = F.head_linear(q_nope, weight, (0, 16), transposed=True)
        o = cache.attend(F.latent_attention, q_latent, q_rope, c_kv, k_rope, scale=SCALE)
        o = F.head_linear(o, weight, (16, 28), transposed=False)
        return F.linear(o.flatten(-2), self.o_proj.weight)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class SwiGLU(Block):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up_proj = gate_up(width, 64)
        self.down_proj = linear(64, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        return swiglu(x, self.gate_up_proj.weight, self.down_proj.weight), None, None


class DeepSeekMoE(Block):
    """8 experts in 2 groups, 2 of 1 group for each token, and one that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Tensors(
            weight=normal(8, 64, std=STD),
            e_score_correction_bias=zeros(8, dtype=torch.float32, buffer=True),
        )
        self.experts = Stack(
            8,
            gate_up_proj=gate_up(8, 40, 64),
            down_proj=Tensors(weight=normal(8, 64, 40, std=STD)),
        )
        self.shared_experts = SwiGLU(40)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score = F.sigmoid(F.linear(x.float(), self.gate.weight.float()))
        index, weight = F.topk_groups(
            score,
            self.gate.e_score_correction_bias,
            n_group=2,
            topk_group=1,
            k=2,
            group_score="top2_sum",
            normalize=True,
            scale=2.5,
        )
        # One unbind for all experts: indexing one by one would cost a full-size gradient each.
        gate_up = self.experts.gate_up_proj.weight.unbind()
        down = self.experts.down_proj.weight.unbind()
        y = torch.zeros_like(x)
        for expert, chosen in enumerate(F.dispatch(index, 8)):
            z = F.gather_tokens(x, chosen)
            F.add_tokens(y, chosen, swiglu(z, gate_up[expert], down[expert]), weight)
        y = y + self.shared_experts(x)[0]
        return y, F.sequence_balance_loss(score, k=2), F.expert_load(index, 8)


class DecoderLayer(Block):
    def __init__(self, mlp: SwiGLU | DeepSeekMoE) -> None:
        super().__init__()
        self.self_attn = MLA()
        self.mlp = mlp
        self.input_layernorm = norm(64)
        self.post_attention_layernorm = norm(64)

    def forward(
        self, x: Tensor, position: Tensor, cache: Cache | Pages | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        normed = F.rms_norm(x, self.input_layernorm.weight, eps=1e-6)
        if cache is None:
            x = x + self.self_attn(normed, position)
        else:
            x = x + self.self_attn.decode(normed, position, cache)
        y, balance, load = self.mlp(F.rms_norm(x, self.post_attention_layernorm.weight, eps=1e-6))
        return x + y, balance, load


class MTP(DecoderLayer):
    def __init__(self) -> None:
        super().__init__(DeepSeekMoE())
        self.enorm = norm(64)
        self.hnorm = norm(64)
        self.eh_proj = linear(64, 128)
        self.shared_head = Tensors(norm=norm(64))


class Model(LanguageModel):
    config = CONFIG
    aliases = {  # noqa: RUF012
        "model.layers.2.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight": "lm_head.weight",
    }
    hf_config = {  # noqa: RUF012
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "moe_intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
        "num_nextn_predict_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }

    def build(self) -> None:
        self.model = Tensors()
        self.model.embed_tokens = linear(96, 64)
        layers = [DecoderLayer(SwiGLU(80)), DecoderLayer(DeepSeekMoE()), MTP()]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = norm(64)
        self.lm_head = linear(96, 64)

    def hidden(
        self, tokens: Tensor, position: Tensor, cache: Cache | Pages | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        balances, loads = [], []
        for layer in self.model.layers[:2]:
            x, balance, load = layer(x, position, cache)
            if balance is not None:
                balances.append(balance)
                loads.append(load)
        return F.rms_norm(x, self.model.norm.weight, eps=1e-6), balances, loads

    def look_ahead(
        self, h: Tensor, tokens: Tensor, position: Tensor, cache: Cache | Pages | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The MTP module, of states and the tokens after them."""
        mtp = self.model.layers[2]
        e = F.embedding(tokens, self.model.embed_tokens.weight)
        e = F.rms_norm(e, mtp.enorm.weight, eps=1e-6)
        both = torch.cat((e, F.rms_norm(h, mtp.hnorm.weight, eps=1e-6)), -1)
        x, balance, load = mtp(F.linear(both, mtp.eh_proj.weight), position, cache)
        return F.rms_norm(x, mtp.shared_head.norm.weight, eps=1e-6), balance, load

    def compute(
        self, tokens: Tensor, position: Tensor | None
    ) -> tuple[Output, list[Tensor], list[Tensor]]:
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        h, balances, loads = self.hidden(tokens, position)
        x, balance, load = self.look_ahead(h[:, :-1], tokens[:, 1:], position[:, 1:])
        logits = [F.linear(y, self.lm_head.weight) for y in (h, x)]
        return Output(logits[0], (logits[1],)), [*balances, balance], [*loads, load]

    def forward(self, tokens: Tensor, position: Tensor | None = None) -> Output:
        return self.compute(tokens, position)[0]

    def loss(
        self, tokens: Tensor, labels: Tensor, position: Tensor | None = None, tokens_seen: int = 0
    ) -> Loss:
        out, balances, loads = self.compute(tokens, position)
        train = self.config.train.loss
        main = F.cross_entropy(out.logits, labels) / F.count_labels(labels)
        mtp = F.cross_entropy(out.mtp_logits[0], labels[:, 1:]) / F.count_labels(labels)
        balance = torch.stack(balances).sum()
        total = main + train.mtp_weight.value_at(tokens_seen) * mtp + train.balance_alpha * balance
        return Loss(total, main, (mtp,), balance, (torch.stack(loads),))

    def prefill(self, tokens: Tensor, position: Tensor, cache: Cache | Pages) -> Tensor:
        return self.decode(tokens, position, cache)

    def decode(self, tokens: Tensor, position: Tensor, cache: Cache | Pages) -> Tensor:
        h, _, _ = self.hidden(tokens, position, cache)
        return F.linear(cache.last(h), self.lm_head.weight)

    draft_offsets = (1,)

    def draft(
        self, state: Tensor, tokens: Tensor, position: Tensor, cache: Cache | Pages
    ) -> Tensor:
        x, _, _ = self.look_ahead(state, tokens, position, cache)
        return F.linear(cache.last(x), self.lm_head.weight)

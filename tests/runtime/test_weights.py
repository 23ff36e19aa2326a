from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch
from torch import nn

from runtime.weights import (
    Block,
    Joined,
    Stack,
    Tensors,
    initialize,
    normal,
    ones,
    published,
    zeros,
)

FLOAT32 = {"dtype": torch.float32, "buffer": True}


def moe(experts: int = 3) -> nn.ModuleDict:
    stack = Stack(
        experts,
        gate_proj=Tensors(weight=normal(experts, 4, 6, std=0.5)),
        down_proj=Tensors(weight=normal(experts, 6, 4, std=0.5)),
    )
    gate = Tensors(weight=normal(experts, 6, std=0.5), bias=zeros(experts, **FLOAT32))
    return nn.ModuleDict({"gate": gate, "experts": stack, "norm": Tensors(weight=ones(6))})


def made(experts: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    module = moe(experts).to(dtype).to_empty(device="cpu")
    initialize(module, seed)
    return module


NAMES = [
    "gate.weight",
    "gate.bias",
    "experts.0.gate_proj.weight",
    "experts.0.down_proj.weight",
    "experts.1.gate_proj.weight",
    "experts.1.down_proj.weight",
    "experts.2.gate_proj.weight",
    "experts.2.down_proj.weight",
    "norm.weight",
]


def test_published_gives_the_names_and_shapes_of_checkpoints() -> None:
    parts = list(published(moe()))
    assert [part.name for part in parts] == NAMES
    assert {part.name: part.shape for part in parts} | {
        "gate.weight": (3, 6),
        "experts.2.gate_proj.weight": (4, 6),
        "norm.weight": (6,),
    } == {part.name: tuple(part.tensor.shape) for part in parts}


def test_published_tensors_are_those_that_are_saved() -> None:
    module = nn.ModuleDict({"linear": nn.Linear(2, 3), "batch_norm": nn.BatchNorm1d(3)})
    module.register_buffer("scratch", torch.zeros(3), persistent=False)
    assert [part.name for part in published(module)] == list(module.state_dict())


def test_experts_are_stored_as_one_tensor() -> None:
    stored = dict(made().named_parameters())
    assert stored["experts.gate_proj.weight"].shape == (3, 4, 6)
    assert len(stored) == 4


def test_published_parts_are_views_of_values_and_gradients() -> None:
    module = made()
    (module["experts"].gate_proj.weight.sum(0) * torch.rand(4, 6)).sum().backward()
    parts = {part.name: part for part in published(module)}
    part = parts["experts.1.gate_proj.weight"]
    part.tensor.fill_(7.0)
    assert module["experts"].gate_proj.weight[1].eq(7).all()
    assert part.grad is not None
    assert torch.equal(part.grad, module["experts"].gate_proj.weight.grad[1])
    assert parts["norm.weight"].grad is None


def test_a_value_depends_on_seed_name_and_shape_only() -> None:
    few, many = (dict(made(experts).state_dict()) for experts in (2, 3))
    for name in ("experts.0.gate_proj.weight", "experts.1.down_proj.weight"):
        assert torch.equal(few[name], many[name])
    assert not torch.equal(many["experts.0.gate_proj.weight"], many["experts.1.gate_proj.weight"])
    assert not torch.equal(few["gate.weight"], made(2, seed=1).state_dict()["gate.weight"])
    half = made(dtype=torch.bfloat16).state_dict()
    assert torch.equal(half["gate.weight"], many["gate.weight"].bfloat16())


def test_storage_does_not_change_values() -> None:
    """The same published tensors, stored one by one, start with the same values."""
    experts = [Tensors(gate_proj=Tensors(weight=normal(4, 6, std=0.5))) for _ in range(3)]
    listed = nn.ModuleDict({"experts": nn.ModuleList(experts)}).to_empty(device="cpu")
    initialize(listed, seed=0)
    stacked = made().state_dict()
    for name, tensor in listed.state_dict().items():
        assert torch.equal(tensor, stacked[name])


def test_normal_values_have_the_declared_deviation() -> None:
    module = Tensors(weight=normal(400, 500, std=0.006)).to_empty(device="cpu")
    initialize(module, seed=3)
    assert module.weight.std().item() == pytest.approx(0.006, rel=0.01)
    assert abs(module.weight.mean().item()) < 0.0001


def test_global_random_state_is_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    first = made().state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first["gate.weight"], made().state_dict()["gate.weight"])


def test_on_the_meta_device_nothing_is_drawn() -> None:
    module = moe()
    initialize(module, seed=0)
    assert all(part.storage.is_meta for part in published(module))


@pytest.mark.parametrize("change", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_a_declared_dtype_survives_casts(change: object) -> None:
    module = made()
    bias = torch.tensor([1 / 3, 1e-9, 1e9])
    module["gate"].bias.copy_(bias)
    change(module)
    assert module["gate"].bias.dtype == torch.float32
    assert torch.equal(module["gate"].bias, bias)
    assert module["gate"].weight.dtype != torch.float32


def test_state_dict_speaks_published_names() -> None:
    module = made()
    state = module.state_dict()
    assert list(state) == NAMES
    state["experts.2.down_proj.weight"].zero_()
    assert module["experts"].down_proj.weight[2].eq(0).all()
    assert next(iter(module["experts"].state_dict(prefix="x."))) == "x.0.gate_proj.weight"


def test_a_state_dict_loads_into_another_module() -> None:
    source, target = made(seed=1), made(seed=2)
    assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_a_state_dict_can_be_assigned_to_a_meta_module() -> None:
    source, target = made(seed=1), moe()
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(
        target["experts"].gate_proj.weight, source["experts"].gate_proj.weight.detach()
    )
    assert target["experts"].gate_proj.weight.requires_grad


def test_loading_names_what_is_missing_left_over_or_misshapen() -> None:
    module = made()
    before = copy.deepcopy(module.state_dict())
    state = made(seed=1).state_dict()
    del state["experts.1.gate_proj.weight"], state["norm.weight"]
    state["experts.3.gate_proj.weight"] = torch.zeros(4, 6)
    state["experts.2.down_proj.weight"] = torch.zeros(4, 4)
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(state)
    message = str(caught.value)
    assert 'Missing key(s) in state_dict: "experts.1.gate_proj.weight", "norm.weight"' in message
    assert 'Unexpected key(s) in state_dict: "experts.3.gate_proj.weight"' in message
    assert "size mismatch for experts.2.down_proj.weight: the state has [4, 4]" in message
    assert torch.equal(
        module.state_dict()["experts.0.gate_proj.weight"], before["experts.0.gate_proj.weight"]
    )


def test_modules_copy_and_pickle_with_their_names() -> None:
    module = made()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.load_state_dict(made(seed=5).state_dict())
        assert list(other.state_dict()) == NAMES
        assert torch.equal(other["norm"].weight, module["norm"].weight)
        assert not torch.equal(other["gate"].weight, module["gate"].weight)


def test_a_stack_holds_equal_groups_only() -> None:
    with pytest.raises(ValueError, match=r"stack of 4 cannot hold up.weight of shape \[3, 2\]"):
        Stack(4, up=Tensors(weight=normal(3, 2, std=1.0)))
    with pytest.raises(ValueError, match="another stack"):
        Stack(2, inner=Tensors(x=Stack(2, y=Tensors(weight=ones(2)))))


class Joint(Block):
    """An MLA's first weights and some experts, with those of the same input stored as one."""

    def __init__(self) -> None:
        super().__init__()
        self.q_a_kv_a = Joined(q_a=normal(5, 6, std=0.5), kv_a=normal(3, 6, std=0.1))
        self.norm = Tensors(weight=ones(6))
        self.experts = Stack(
            2,
            gate_up=Joined(gate=normal(2, 4, 6, std=0.5), up=normal(2, 3, 6, std=0.5)),
            mlp=Tensors(a_b=Joined(a=normal(2, 1, 6, std=0.5), b=normal(2, 2, 6, std=0.5))),
        )
        self.mlp = Tensors(w1_w3=Joined(w1=zeros(2, 6), w3=ones(4, 6)))


class Apart(Block):
    """The same weights, each in a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_a = Tensors(weight=normal(5, 6, std=0.5))
        self.kv_a = Tensors(weight=normal(3, 6, std=0.1))
        self.norm = Tensors(weight=ones(6))
        mlp = {
            "a": Tensors(weight=normal(1, 6, std=0.5)),
            "b": Tensors(weight=normal(2, 6, std=0.5)),
        }
        experts = (
            Tensors(
                gate=Tensors(weight=normal(4, 6, std=0.5)),
                up=Tensors(weight=normal(3, 6, std=0.5)),
                mlp=Tensors(
                    **{n: Tensors(weight=m.declarations["weight"]) for n, m in mlp.items()}
                ),
            )
            for _ in range(2)
        )
        self.experts = nn.ModuleList(experts)
        self.mlp = Tensors(w1=Tensors(weight=zeros(2, 6)), w3=Tensors(weight=ones(4, 6)))


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    module = module.to_empty(device="cpu")
    initialize(module, seed)
    return module


def test_joined_weights_are_published_one_by_one_with_the_same_first_values() -> None:
    joined, apart = filled(Joint()), filled(Apart())
    assert {p.name for p in published(joined)} == {p.name for p in published(apart)}
    assert list(joined.state_dict()) == [p.name for p in published(joined)]
    for name, tensor in apart.state_dict().items():
        assert torch.equal(joined.state_dict()[name], tensor), name
    parts = {p.name: p for p in published(joined)}
    for name, tensor in joined.state_dict().items():
        assert parts[name].shape == parts[name].tensor.shape == tensor.shape
        assert torch.equal(parts[name].tensor, tensor)
    assert joined.q_a_kv_a.weight.shape == (8, 6)
    assert torch.equal(joined.q_a_kv_a.weight[5:], apart.kv_a.weight)
    assert joined.experts.gate_up.weight.shape == (2, 7, 6)
    assert torch.equal(joined.experts.gate_up.weight[1, :4], apart.experts[1].gate.weight)


def test_the_parts_of_joined_weights_are_views_of_values_and_gradients() -> None:
    module = filled(Joint())
    (
        module.q_a_kv_a.weight.square().sum() + module.experts.gate_up.weight.square().sum()
    ).backward()
    parts = {part.name: part for part in published(module)}
    for name in ("kv_a.weight", "experts.1.up.weight"):
        assert parts[name].grad is not None
        assert torch.equal(parts[name].grad, 2 * parts[name].tensor)
        parts[name].tensor.fill_(7.0)
    assert module.q_a_kv_a.weight[5:].eq(7).all() and not module.q_a_kv_a.weight[:5].eq(7).any()
    assert module.experts.gate_up.weight[1, 4:].eq(7).all()
    assert not module.experts.gate_up.weight[0].eq(7).any()


@pytest.mark.parametrize("assign", [False, True])
def test_states_go_between_joined_weights_and_single_ones(assign: bool) -> None:
    joined, apart = filled(Joint(), seed=1), filled(Apart(), seed=2)
    wanted = {name: tensor.clone() for name, tensor in joined.state_dict().items()}
    apart.load_state_dict(joined.state_dict(), assign=assign)
    again = Joint() if assign else filled(Joint(), seed=3)
    again.load_state_dict(apart.state_dict(), assign=assign)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        other.load_state_dict(filled(Apart(), seed=4).state_dict())
        assert torch.equal(again.q_a_kv_a.weight[:5], wanted["q_a.weight"])


def test_loading_names_the_parts_that_do_not_fit() -> None:
    module = filled(Joint())
    before = copy.deepcopy(module.state_dict())
    state = filled(Apart(), seed=1).state_dict()
    del state["q_a.weight"], state["experts.1.mlp.b.weight"]
    state["mlp.w3.weight"] = torch.zeros(3, 6)
    state["more.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(state)
    message = str(caught.value)
    assert 'Missing key(s) in state_dict: "experts.1.mlp.b.weight", "q_a.weight"' in message or (
        'Missing key(s) in state_dict: "q_a.weight", "experts.1.mlp.b.weight"' in message
    )
    assert 'Unexpected key(s) in state_dict: "more.weight".' in message
    assert "size mismatch for mlp.w3.weight: the state has [3, 6], the model [4, 6]." in message
    assert torch.equal(module.state_dict()["kv_a.weight"], before["kv_a.weight"])


def test_only_weights_of_one_kind_are_joined() -> None:
    with pytest.raises(ValueError, match="b cannot be joined"):
        Joined(a=normal(3, 6, std=1.0), b=normal(3, 5, std=1.0))
    with pytest.raises(ValueError, match="b cannot be joined"):
        Joined(a=normal(3, 6, std=1.0), b=normal(3, 6, std=1.0, dtype=torch.float32))
    kept = filled(nn.ModuleList([Joined(a=ones(2, 3, dtype=torch.float32))]).bfloat16())
    assert kept[0].weight.dtype == torch.float32


@pytest.mark.slow
def test_experts_of_all_of_v3_are_declared_in_no_time() -> None:
    began = time.process_time()  # of this process alone, whatever else the machine does
    shapes = {"gate_proj": (2048, 7168), "up_proj": (2048, 7168), "down_proj": (7168, 2048)}
    layers = nn.ModuleList(
        Stack(256, **{n: Tensors(weight=normal(256, *s, std=0.006)) for n, s in shapes.items()})
        for _ in range(58)
    ).to(torch.bfloat16)
    initialize(layers, seed=0)
    assert time.process_time() - began < 1
    assert sum(p.numel() for p in layers.parameters()) == 653_908_770_816
    assert sum(1 for _ in published(layers)) == 58 * 256 * 3


def test_printing_shows_the_shapes() -> None:
    assert "weight=[3, 4, 6]" in repr(moe())
    assert "(q_a_kv_a): Joined(q_a=[5, 6], kv_a=[3, 6])" in repr(Joint())

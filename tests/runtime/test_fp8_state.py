"""FP8 copies of weights are state: made once for each value of a weight, and never stale."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.build import build
from dsl.load import load
from tests.support.places import TINY

FP8 = ["precision.policy=fp8_blockwise", "model=fp8_state"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("fp8_state")
    build(load(TINY, sets=FP8), folder / "fp8_state")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return importlib.import_module("fp8_state")


class Count:
    """A model whose casts of weights are counted."""

    def __init__(self, package: Any) -> None:
        self.model = package.Model(seed=1)
        self.made = 0
        tensors = importlib.import_module(f"{package.__name__}.runtime.weights").Tensors
        found = (m for m in self.model.modules() if isinstance(m, tensors))
        weights = ((m, m.declarations.get("weight")) for m in found)
        self.holders = [module for module, weight in weights if weight and weight.fp8]
        for holder in self.holders:
            holder.quantize_weight = self._counting(holder.quantize_weight)
        self.tokens = torch.randint(512, (2, 17), generator=torch.Generator().manual_seed(0))

    def _counting(self, quantize: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.made += 1
            return quantize(*arguments, **keywords)

        return counted

    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.model.loss(self.tokens[:, :-1], self.tokens[:, 1:]).total
        return loss

    def since(self, act: Callable[[], Any]) -> int:
        """How many copies an action makes."""
        before = self.made
        act()
        return self.made - before


@pytest.fixture
def count(package: Any) -> Iterator[Count]:
    yield Count(package)


@pytest.mark.slow
def test_one_cast_of_each_weight_in_a_step_whatever_the_micro_batches(count: Count) -> None:
    optimizer = torch.optim.SGD(count.model.parameters(), lr=0.1)
    assert len(count.holders) > 20
    for _ in range(2):
        assert count.since(lambda: [count.loss().backward() for _ in range(3)]) == len(
            count.holders
        )
        optimizer.step()
        optimizer.zero_grad()


def test_decoding_makes_each_copy_once(count: Count) -> None:
    count.since(lambda: count.model.generate(count.tokens[:, :4], max_new_tokens=2))
    assert count.since(lambda: count.model.generate(count.tokens[:, :4], max_new_tokens=9)) == 0


def changed(count: Count) -> torch.Tensor:
    """Scores after a change, which must be those of a model that has just been made."""
    with torch.no_grad():
        scores: torch.Tensor = count.model(count.tokens).logits
        fresh = copy.deepcopy(count.model)
        for module in fresh.modules():
            if "_copy" in module.__dict__:
                module.__dict__["_copy"] = None
        assert torch.equal(scores, fresh(count.tokens).logits)
    return scores


def in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def loaded(model: Any) -> None:
    state = {name: 0.5 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def data_replaced(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = 2 * parameter.data


def parameter_replaced(model: Any) -> None:
    for module in model.modules():
        if "weight" in dict(module.named_parameters(recurse=False)):
            module.weight = torch.nn.Parameter(-module.weight.detach())


def through_a_kernel(model: Any) -> None:
    """Memory that is written behind autograd's back, and said to have been."""
    for parameter in model.parameters():
        parameter.data.mul_(3)
        torch.autograd.graph.increment_version(parameter)


def another_dtype(model: Any) -> None:
    in_place(model)
    model.float()


@pytest.mark.parametrize(
    "change",
    [in_place, loaded, data_replaced, parameter_replaced, through_a_kernel, another_dtype],
)
def test_no_copy_is_stale(count: Count, change: Callable[[Any], None]) -> None:
    before = changed(count)
    change(count.model)
    assert not torch.equal(before, changed(count))


def test_a_weight_that_changes_between_loss_and_backward_is_an_error(count: Count) -> None:
    loss = count.loss()
    in_place(count.model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_is_told_that_it_has_no_gradient_of_an_fp8_product(count: Count) -> None:
    for parameter in count.model.parameters():
        parameter.requires_grad_(False)
    count.model.model.layers[0].self_attn.o_proj.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="autograd has no gradient of products in FP8"):
        count.model(count.tokens).logits.sum().backward()


def test_it_runs_under_inference_mode(count: Count, tmp_path: Path) -> None:
    with torch.inference_mode():
        assert torch.isfinite(count.model(count.tokens).logits).all()

"""Whether a kernel computes what torch's reference does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from backends.triton.arguments import PIECE, CaseRecord, arguments_of, log_sum_exp
from backends.triton.kernel import MODULES

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = {"fp8": 1e-3, "bf16": 5e-6, "memory": 5e-6}
"""The largest `difference` by what does the work, as DeepGEMM (FP8) and FlashMLA (BF16) have it."""

COARSE = {f"{name}_grad": 5e-5 for name in ("attention", "attention_varlen", "document_attention")}
"""As `LIMIT`, where the reference is the coarser one: torch rounds d V^T to bfloat16 before it
subtracts from it, which for short sequences leaves less (1.6e-5 for 33 tokens)."""

EXACT = ("unpack", "dequantize")
"""Functions of which every number must be that of the reference: they are of so many sizes that
small ones are nothing beside the largest."""

WIDE = ("latent_attention",)
"""Functions whose reference rounds every product to bfloat16, scores included, where there is no
CPU (1.4e-4 for 4,096 keys): it is given the same numbers in float32, and its result is rounded."""

WITHOUT_LSE = ("attention_saving", "document_attention_saving")
"""Functions whose reference gives no log-sum-exp where there is no CPU: it is computed here. A
library must give the same, since another kernel may take the gradient."""


def results_of(value: Any) -> list[Tensor]:
    """The tensors that a function returned."""
    from torch import Tensor

    return [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]


def difference(found: Tensor, expected: Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2) in float64: 0 where both are equal, 0 of nothing."""
    import torch

    product = total = 0.0
    pairs = zip(*(torch.split(x.flatten(), PIECE) for x in (found, expected)), strict=True)
    for x, y in ((x.double(), y.double()) for x, y in pairs):
        product += float(x @ y)
        total += float(x @ x + y @ y)
    return 1 - 2 * product / total if total else 0.0


def problem(found: Any, expected: Any, limit: float) -> str:
    """What is wrong with the results of a kernel; nothing is an empty text.

    Whole numbers and FP8 numbers must be equal, floats near by `difference` and finite alike; all
    of them equal for a limit of 0.
    """
    import torch

    pairs = zip(results_of(found), results_of(expected), strict=True)
    for i, (x, y) in enumerate(pairs):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"result {i} is {x.dtype} {list(x.shape)}, not {y.dtype} {list(y.shape)}"
        if not x.dtype.is_floating_point or x.element_size() == 1:
            wrong = int((_bytes(x) != _bytes(y)).sum()) if x.numel() else 0
            if wrong:
                return f"result {i} differs in {wrong} bytes"
            continue
        if not torch.equal(x.isfinite(), y.isfinite()):
            return f"result {i} is finite elsewhere than the reference"
        if not limit:
            wrong = int((x.nan_to_num() != y.nan_to_num()).sum())
            if wrong:
                return f"result {i} differs in {wrong} numbers"
            continue
        found_difference = difference(x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0))
        if found_difference > limit:
            return f"result {i} differs by {found_difference:.1e}, {limit:.0e} is the most"
    return ""


def same_bits(first: Any, second: Any) -> bool:
    """Whether two runs gave the same bytes."""
    import torch

    pairs = zip(results_of(first), results_of(second), strict=True)
    return all(torch.equal(_bytes(x), _bytes(y)) for x, y in pairs if x.numel())


def _bytes(x: Tensor) -> Tensor:
    import torch

    return x.reshape(-1).view(torch.uint8)


def checked(kernel: Any, reference: Any, case: CaseRecord, device: str = "cuda") -> str:
    """What is wrong with the results of a case, or nothing.

    Each side has arguments of its own, since some functions write to what they are given.
    """
    import torch

    limit = COARSE.get(case["function"], LIMIT[case["bound_by"]])
    limit = 0.0 if case["function"] in EXACT else limit

    def run(function: Any) -> list[Tensor]:
        arguments, keywords = arguments_of(case, torch.device(device))
        if function is reference and case["function"] in WIDE:
            arguments = [x.float() if isinstance(x, torch.Tensor) else x for x in arguments]
        results = results_of(function(*arguments, **keywords))
        if function is reference and case["function"] in WITHOUT_LSE and device != "cpu":
            q, k, _, *rest = arguments
            results[1] = log_sum_exp(q, k, *rest, **keywords)
        return results

    found = run(kernel)
    if not same_bits(found, run(kernel)):
        return "two runs differ"
    expected = run(reference)
    if case["function"] in WIDE:
        expected = [x.to(y.dtype) for x, y in zip(expected, found, strict=True)]
    return problem(found, expected, limit)


def reference_of(file: CaseRecord, case: CaseRecord) -> Any:
    """The function of `runtime/` that the launcher of a case replaces."""
    names = [path for path in file["serves"] if path.rpartition(".")[2] == case["function"]]
    for path in names:
        module, _, function = path.partition(".")
        return getattr(importlib.import_module(f"runtime.{MODULES[module]}"), function)
    raise ValueError(f"{case['function']} replaces no function of runtime/")

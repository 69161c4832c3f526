"""What lapefast is compared with: forward hooks on activation modules, and nothing of lapefast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def hooked(activations: Mapping[str, nn.Module], change: Callable | None = None):
    """Collect each activation module's outputs, of every call, ``site -> list``.

    Args:
        change: ``change(site, output)`` replaces the output, where given.
    """
    seen: dict[str, list[Tensor]] = {site: [] for site in activations}

    def hook(site: str):
        def run(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if change is None:
                seen[site].append(output.detach().clone())
                return None
            changed = change(site, output)
            seen[site].append(changed.detach().clone())
            return changed

        return run

    handles = [module.register_forward_hook(hook(site)) for site, module in activations.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def counts(seen: list[Tensor], groups: Tensor, labels: int, threshold: float = 0.0) -> Tensor:
    """Active tokens per label and neuron, int64 [labels, width]; ``groups`` is one per token."""
    total = 0
    for activation in seen:
        rows = activation.reshape(-1, activation.shape[-1])
        active = rows.to(torch.float32) > torch.tensor(threshold, dtype=torch.float32)
        total = total + torch.stack(
            [active[groups.reshape(-1) == label].sum(0) for label in range(labels)]
        )
    return total


def tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors(part)]
    return []  # a cache, whose layers hold what the outputs were made of


def same(first: Any, second: Any) -> bool:
    """Whether two outputs are equal bit for bit, the sign of zero and NaN included."""
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    assert pairs
    return all(_bits(a).equal(_bits(b)) for a, b in pairs)


def _bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Each module's ``__dict__``, with hook and module dictionaries copied out."""
    return {
        path: {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(module).items()
        }
        for path, module in model.named_modules()
    }


def assert_untouched(
    before: dict[str, dict[str, Any]], model: nn.Module, but: tuple[str, ...] = ()
) -> None:
    """Each module's ``__dict__`` is as before: keys in order, values by identity (not ``but``)."""
    after = attributes(model)
    assert before.keys() == after.keys()
    for path, values in before.items():
        assert list(values) == list(after[path]), path
        for name, value in values.items():
            now = after[path][name]
            if name in but:
                continue
            if isinstance(value, dict):
                assert list(value) == list(now), (path, name)
                assert all(now[key] is value[key] for key in value), (path, name)
            else:
                assert now is value, (path, name)

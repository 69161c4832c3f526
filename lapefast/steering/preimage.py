"""What an activation must be given to return a wanted value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["preimages"]


@torch.no_grad()
def preimages(
    activation: nn.Module, values: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each value the input whose activation comes closest, by the module's own arithmetic.

    A value counts as reached within 2 spacings, relative. The input's rounding moves the
    activation by half a spacing times the condition b act'(b) / act(b), which is at most 2 for
    the activations that models use (ReLU squared; SiLU's and GELU's stay below 1.3 on the branch
    towards 0), and the activation is rounded by another half. In bfloat16 that is 1.6 %.

    Args:
        activation: an elementwise module.
        values: float32 [n], none of them 0.
        dtype: of the input, float32, float16 or bfloat16.

    Returns:
        Inputs [n] in `dtype` on `device`; bool [n] on the CPU: whether each value is reached.
    """
    coarse = dtype if dtype != torch.float32 else torch.bfloat16
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(coarse)
    every = every[every.isfinite()].to(device, dtype)
    activated = activation(every).float()
    # A value is often meant for many neurons.
    distinct, inverse = values.unique(return_inverse=True)
    found = torch.stack(
        [_nearest_input(activation, every, activated, value) for value in distinct.to(device)]
    )
    misses = (activation(found).float().cpu() - distinct).abs()
    reached = misses <= 2 * torch.finfo(dtype).eps * distinct.abs()
    return found[inverse.to(device)], reached[inverse]


def _nearest_input(
    activation: nn.Module, every: Tensor, activated: Tensor, value: Tensor
) -> Tensor:
    # Several, because SiLU and GELU take a negative value on two branches, one of them ill-suited.
    nearest = _distances(activated, value).topk(8, largest=False).indices
    found = every[nearest]
    if every.dtype == torch.float32:
        # Between neighbours of the coarse numbers lie 2^16 of float32's, in the order of their
        # bits.
        for step in (2**8, 1):
            around = torch.arange(-(2**8), 2**8 + 1, device=every.device, dtype=torch.int32) * step
            near = (found.view(torch.int32)[:, None] + around).view(torch.float32)
            chosen = _distances(activation(near), value).argmin(dim=1, keepdim=True)
            found = near.gather(1, chosen)[:, 0]
    return found[_distances(activation(found), value).argmin()]


def _distances(activated: Tensor, value: Tensor) -> Tensor:
    return (activated.float() - value).abs().nan_to_num(nan=float("inf"))

"""Tiny random mixtures of experts, and what a plain loop over experts and tokens sees in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from families import MODERN, VERSION_4, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 24  # transformers' grouped product wants rows of whole 16 bytes
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
MIXTURE = {**MODERN, "intermediate_size": 40, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": WIDTH,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

needs_5 = pytest.mark.skipif(
    VERSION_4, reason="transformers 4 has a module for each expert (test_listed_experts.py)"
)


@dataclass(frozen=True)
class Mixture:
    """One row.

    Attributes:
        name: class name in transformers.
        options: what the configuration is made of.
        experts: how many there are.
        dense: dense FFNs, site -> width; mixtures of `WIDTH` are at the other layers.
    """

    name: str
    options: Mapping[str, Any]
    experts: int = 4
    dense: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32, implementation: str = "eager") -> nn.Module:
        """The model in eval mode; the same weights at every call."""
        cls = getattr(transformers, self.name)
        torch.manual_seed(0)
        with torch.random.fork_rng():
            model = cls(cls.config_class(**{**MIXTURE, **self.options})).eval().to(dtype)
        model.set_experts_implementation(implementation)
        return model


MIXTURES = (
    Mixture("MixtralForCausalLM", {"num_local_experts": 4, "intermediate_size": WIDTH}),
    Mixture(
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4,
            "moe_intermediate_size": WIDTH,
            "shared_expert_intermediate_size": 56,
            "mlp_only_layers": [0],
        },
        dense={"layers.0.mlp": 40, "layers.1.mlp.shared_expert": 56},
    ),
    Mixture(
        "Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": WIDTH, "head_dim": 8}
    ),
    Mixture("OlmoeForCausalLM", {"num_experts": 4, "intermediate_size": WIDTH}),
    Mixture(
        "DeepseekV2ForCausalLM",
        LATENT,
        experts=8,
        dense={"layers.0.mlp": 40, "layers.1.mlp.shared_experts": WIDTH},
    ),
    Mixture(
        "DeepseekV3ForCausalLM",
        LATENT,
        experts=8,
        dense={"layers.0.mlp": 40, "layers.1.mlp.shared_experts": WIDTH},
    ),
    Mixture(
        "GptOssForCausalLM",
        {"num_local_experts": 4, "intermediate_size": WIDTH, "head_dim": 8},
    ),
    Mixture(
        "HYV4ForCausalLM",
        {
            **LATENT,
            "n_routed_experts": 4,
            "n_group": 1,
            "num_local_experts": 4,
            "swiglu_limit": 0.5,
            "indexer_types": ["full", "full"],
        },
        dense={"layers.0.mlp": 40, "layers.1.mlp.shared_experts": WIDTH},
    ),
    Mixture(
        "ZayaForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": WIDTH,
            "router_hidden_size": 16,
            "head_dim": 8,
        },
    ),
    Mixture(
        "MiniMaxM3VLForCausalLM",
        {
            "num_local_experts": 4,
            "intermediate_size": WIDTH,
            "shared_intermediate_size": WIDTH,
            "dense_intermediate_size": 40,
            "mlp_layer_types": ["dense", "sparse"],
            "head_dim": 8,
            "rotary_dim": 4,
            "swiglu_limit": 0.5,
        },
        dense={"layers.0.mlp": 40, "layers.1.mlp.shared_experts": WIDTH},
    ),
)


def by_name(name: str) -> Mixture:
    return next(mixture for mixture in MIXTURES if mixture.name == name)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Site -> experts, found by the name that all of these families give them."""
    return {
        name: module
        for name, module in model.model.named_modules()
        if name.rpartition(".")[2] == "experts"
    }


@dataclass
class Call:
    """One forward pass of a mixture, of which a plain loop knows whose each row is.

    Attributes:
        activations: one tensor [rows, width] for every time that the gate was applied.
        owners: (expert, token) of each of their rows.
        routed: (expert, token) whose weight is not 0.
    """

    activations: list[Tensor]
    owners: list[list[tuple[int, int]]]
    routed: set[tuple[int, int]]


Change = Callable[[str, Tensor, list[tuple[int, int]]], Tensor]


@contextmanager
def watched(model: nn.Module, change: Change | None = None):
    """Every call of every mixture, site -> list, without lapefast.

    Whose a row of the gate is, is found out by comparing it with all rows that a loop over tokens
    and experts computes one by one; the nearest must be far nearer than the second.

    Args:
        change: ``change(site, activation, owners)`` replaces the activation, where given.
    """
    calls: dict[str, list[Call]] = {site: [] for site in experts_of(model)}
    undo = [
        _watch(site, experts, calls[site], change) for site, experts in experts_of(model).items()
    ]
    try:
        yield calls
    finally:
        for one in undo:
            one()


def _watch(site: str, experts: nn.Module, calls: list[Call], change: Change | None):
    rows: dict[tuple[int, int], Tensor] = {}

    def before(module: nn.Module, args: tuple) -> None:
        hidden, chosen, weights = args
        rows.clear()
        routed = set()
        for token, ranked in enumerate(chosen.tolist()):
            for expert, weight in zip(ranked, weights[token].tolist(), strict=True):
                rows[expert, token] = _gate(experts, hidden[token], expert)
                if weight != 0:
                    routed.add((expert, token))
        calls.append(Call([], [], routed))

    def seen(gate: Tensor, activation: Tensor) -> Tensor:
        owners = [_owner(row, rows) for row in gate]
        if change is not None:
            activation = change(site, activation, owners)
        calls[-1].activations.append(activation.detach().clone())
        calls[-1].owners.append(owners)
        return activation

    hooks = [experts.register_forward_pre_hook(before)]
    if hasattr(experts, "act_fn"):
        hooks.append(
            experts.act_fn.register_forward_hook(lambda module, args, out: seen(args[0], out))
        )
    else:

        def gated(gate_up: Tensor) -> Tensor:
            gate, up = _halves(experts, gate_up)
            alpha = getattr(experts, "alpha", getattr(experts, "swiglu_alpha", None))
            if alpha is not None:  # gpt-oss, MiniMax M3
                return (up + 1) * seen(gate, gate * torch.sigmoid(gate * alpha))
            return up * seen(gate, functional.silu(gate))

        experts._apply_gate = gated

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        experts.__dict__.pop("_apply_gate", None)

    return undo


def _gate(experts: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    weight = experts.gate_up_proj[expert]
    if hasattr(experts, "alpha"):
        gate_up = hidden @ weight + experts.gate_up_proj_bias[expert]
    else:
        gate_up = functional.linear(hidden, weight)
    if not hasattr(experts, "act_fn"):
        return _halves(experts, gate_up)[0]
    return gate_up.chunk(2)[0]


def _halves(experts: nn.Module, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Clamped gate and up of experts whose activation is no module."""
    if hasattr(experts, "alpha"):
        gate, up, limit = gate_up[..., ::2], gate_up[..., 1::2], experts.limit
    else:
        (gate, up), limit = gate_up.chunk(2, dim=-1), experts.swiglu_limit
    return gate.clamp(max=limit), up.clamp(min=-limit, max=limit)


def _owner(gate: Tensor, rows: Mapping[tuple[int, int], Tensor]) -> tuple[int, int]:
    owners = list(rows)
    distances = (torch.stack(list(rows.values())).double() - gate.double()).norm(dim=1)
    least, second = distances.topk(2, largest=False).values.tolist()
    assert 5 * least < second
    return owners[int(distances.argmin())]


def counts(calls: list[Call], groups: Tensor, labels: int, experts: int, threshold: float = 0.0):
    """Active rows that were routed, int64 [labels, experts, width], and all, [labels, experts]."""
    groups = groups.flatten().tolist()
    active = torch.zeros(labels, experts, WIDTH, dtype=torch.int64)
    routed = torch.zeros(labels, experts, dtype=torch.int64)
    for call in calls:
        for activation, owners in zip(call.activations, call.owners, strict=True):
            for row, (expert, token) in zip(activation, owners, strict=True):
                if groups[token] >= 0 and (expert, token) in call.routed:
                    limit = torch.tensor(threshold, dtype=torch.float32)
                    active[groups[token], expert] += row.float() > limit
                    routed[groups[token], expert] += 1
    return active, routed


IDS = torch.arange(24).reshape(3, 8) * 31 % (VOCABULARY - 10) + 5

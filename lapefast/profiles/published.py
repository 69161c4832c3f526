"""The published count files: one torch-saved dict per language, `n` and `over_zero`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lapefast.errors import InputError
from lapefast.files import read_torch, write_torch
from lapefast.models.sites import Site

if TYPE_CHECKING:
    from lapefast.profiles.profile import Profile

__all__ = ["read", "write"]

_WHAT = "count file"
_INTEGERS = (torch.int32, torch.int64)


def read(
    files: Mapping[str, str | os.PathLike[str]], model: torch.nn.Module | None
) -> tuple[
    list[str],
    list[Site],
    dict[str, torch.Tensor],
    dict[str, dict[str, torch.Tensor]],
    dict[str, Any],
]:
    """The arguments of `Profile`, from published count files; see `Profile.from_published`."""
    if not files:
        raise InputError("no count files were given; give at least one, as {label: path}")
    tokens, counts = zip(*(_read_one(path) for path in files.values()), strict=True)
    first = counts[0].shape
    for path, count in zip(files.values(), counts, strict=True):
        if count.shape != first:
            raise InputError(
                f"count files must be of one model, but {path} holds {list(count.shape)} layers "
                f"by neurons where {next(iter(files.values()))} holds {list(first)}"
            )
    stacked = torch.stack(counts, dim=1)
    metadata: dict[str, Any] = {
        "threshold": 0.0,
        "corpora": [
            {"label": label, "source": None, "tokens": n}
            for label, n in zip(files, tokens, strict=True)
        ],
        "count_files": {label: os.fspath(path) for label, path in files.items()},
    }
    if model is None:
        sites = [Site(str(layer), int(first[1]), "unknown") for layer in range(first[0])]
    else:
        sites = _sites_of(model, first)
        metadata |= _identity(model)
    per_stack = {site.stack: torch.tensor(tokens) // site.calls for site in sites}
    by_site = {site.name: stacked[layer] for layer, site in enumerate(sites)}
    return list(files), sites, per_stack, {"counts": by_site}, metadata


def write(path: str | os.PathLike[str], profile: Profile) -> dict[str, str]:
    """Write one count file per label, all or none; see `Profile.save_published`."""
    counts = profile.published_counts()
    tokens = profile.site_tokens(profile.sites[0])
    if any(not torch.equal(profile.site_tokens(site), tokens) for site in profile.sites):
        raise InputError(
            "a published count file holds one number of tokens for all layers, but this profile's "
            "sites saw different numbers; save it as a profile instead"
        )
    limit = torch.iinfo(torch.int32).max
    if counts.max() > limit:
        raise InputError(
            f"a published count file holds int32, but a count here is {int(counts.max())}, above "
            f"{limit}; save it as a profile instead"
        )
    template = os.fspath(path)
    if "{label}" not in template:
        model = Path(str(profile.metadata.get("model") or "model")).name
        template = os.path.join(template, f"activation.{{label}}.train.{model}")
    paths = {label: template.replace("{label}", label) for label in profile.labels}
    contents = [
        {"n": n, "over_zero": over_zero.to(torch.int32).contiguous()}
        for n, over_zero in zip(tokens.tolist(), counts.unbind(dim=-1), strict=True)
    ]
    write_torch(dict(zip(paths.values(), contents, strict=True)))
    return paths


def _read_one(path: str | os.PathLike[str]) -> tuple[int, torch.Tensor]:
    """Tokens, and counts int64 [layers, neurons]."""
    content = read_torch(path, _WHAT)
    if not isinstance(content, dict) or not {"n", "over_zero"} <= content.keys():
        raise InputError(f"the count file {path} must hold a dict with n and over_zero")
    n, over_zero = content["n"], content["over_zero"]
    if isinstance(n, torch.Tensor) and n.numel() == 1 and n.dtype in _INTEGERS:
        n = int(n)
    if type(n) is not int or not 0 <= n <= torch.iinfo(torch.int64).max:
        raise InputError(f"n of the count file {path} must be a number of tokens, got {n!r:.80}")
    tensor = isinstance(over_zero, torch.Tensor)
    if not tensor or over_zero.dtype not in _INTEGERS or over_zero.dim() != 2:
        what = f"{over_zero.dtype} {list(over_zero.shape)}" if tensor else type(over_zero).__name__
        raise InputError(
            f"over_zero of the count file {path} must be int32 [layers, neurons], got {what}"
        )
    counts = over_zero.detach().to(torch.int64)
    if counts.numel() == 0 or counts.min() < 0 or counts.max() > n:
        raise InputError(
            f"over_zero of the count file {path} must hold counts between 0 and n = {n}, "
            "but some are outside, or there are none"
        )
    return n, counts


def _sites_of(model: torch.nn.Module, shape: torch.Size) -> list[Site]:
    from lapefast.models import find_sites

    sites = find_sites(model)
    for site in sites:
        if site.experts:
            raise InputError(
                f"count files hold dense layers only, but the model's {site.name} is a mixture of "
                "experts; give the model that was counted"
            )
    widths = {site.width for site in sites}
    if len(sites) != shape[0] or widths != {shape[1]}:
        raise InputError(
            f"the count files hold {shape[0]} layers of {shape[1]} neurons, but the model has "
            f"{len(sites)} sites of widths {sorted(widths)}; give the model that was counted"
        )
    return sites


def _identity(model: torch.nn.Module) -> dict[str, Any]:
    from lapefast.models import fingerprint

    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {"model": name or None, "fingerprint": fingerprint(model)}

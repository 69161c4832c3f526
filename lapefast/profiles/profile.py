"""A profile: sufficient statistics of a model's neurons over a corpus, per label and site."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from lapefast import display
from lapefast.errors import InputError
from lapefast.files import existing_file
from lapefast.models.sites import Site
from lapefast.profiles import published, storage
from lapefast.profiles.shards import SHARDS, check_shards, narrowed

__all__ = ["STATISTICS", "Profile"]

STATISTICS = {
    "counts": torch.int64,
    "sums": torch.float64,
    "square_sums": torch.float64,
    "up_abs_sums": torch.float64,
    "shard_counts": torch.int32,
}
"""Each statistic's dtype: active tokens, the sum of activations, of squared products, of |up|, and
the active tokens of each shard of the text."""

Over = Literal["routed", "all"]
"""Which tokens a mixture's statistics are shares of: those routed to each expert, or all."""

_SHARED = ("model", "fingerprint", "dtype", "threshold", "edited")
"""Metadata that profiles have in common when they are added; `model` is only a name."""


class Profile:
    """Statistics of every neuron over texts, per label. Profiles of one model add up.

    Args:
        labels: what the texts are grouped by; distinct.
        sites: the model's sites, in model order.
        tokens: stack -> int64 [labels], tokens that entered each stack.
        statistics: name (see `STATISTICS`) -> site name -> [labels, width], in a mixture
            [labels, experts, width]; of `shard_counts`, which need `counts` beside them, [labels,
            SHARDS, ...]. Kept, not copied.
        metadata: what can be written as JSON. `fingerprint`, `dtype`, `threshold` and `edited`
            must agree (where known) when profiles are added; `model` names the model; `corpora`
            lists dicts with `label`, `source`, `identity`, and `rows` [start, stop] of `seq_len`
            tokens, and `part` where it is one of several, by which text that is counted twice for a
            label is found (no identity: by its source; a source None is like no other); anything
            else, such as tokenizer, batch size, threads and versions, describes the run.
        routed: mixture -> int64 [labels, experts], the label's tokens that each expert saw.
        shard_tokens: where there are `shard_counts`: stack -> int64 [labels, SHARDS], mixture ->
            int64 [labels, SHARDS, experts].

    Raises:
        InputError: shapes, dtypes or names are not as said, a count is negative or above the
            label's tokens (in a mixture, those routed there), shards do not add up to the whole, or
            a sum is not finite.
    """

    def __init__(
        self,
        labels: Sequence[str],
        sites: Sequence[Site],
        tokens: Mapping[str, torch.Tensor],
        statistics: Mapping[str, Mapping[str, torch.Tensor]],
        metadata: Mapping[str, Any] | None = None,
        routed: Mapping[str, torch.Tensor] | None = None,
        shard_tokens: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.labels = list(labels)
        self.site_info = list(sites)
        self._sites = {site.name: site for site in sites}
        self.stack_tokens = {stack: count.detach().cpu() for stack, count in tokens.items()}
        # Through JSON, so that a profile and its loaded copy say the same.
        self.metadata: dict[str, Any] = json.loads(json.dumps(dict(metadata or {})))
        self._check_structure()
        self.routed = self._checked_routed(dict(routed or {}))
        """Mixture -> the label's tokens that each expert saw, int64 [labels, experts]."""
        self.shard_tokens = {
            name: count.detach().cpu() for name, count in (shard_tokens or {}).items()
        }
        self.statistics = {
            name: {site: self._checked(name, site, values) for site in self._sites}
            for name, values in statistics.items()
        }
        check_shards(self)

    @property
    def sites(self) -> list[str]:
        """Names of the sites, in model order."""
        return list(self._sites)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the model, if known."""
        return self.metadata.get("fingerprint")

    @property
    def positional(self) -> bool:
        """Whether sites are known by position only, as in published count files."""
        return self.sites == [str(position) for position in range(len(self.sites))]

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens per label, int64 [labels]: of the encoder, if the model has one."""
        return self.stack_tokens[storage.main_stack(self.stack_tokens)]

    def site_tokens(self, site: str) -> torch.Tensor:
        """Tokens per label that passed a site, int64 [labels]: its stack's, at each call."""
        return self.stack_tokens[self._sites[site].stack] * self._sites[site].calls

    def seen_tokens(self, site: str, over: Over = "routed") -> torch.Tensor:
        """What a site's statistics are shares of: int64 [labels], in a mixture [labels, experts].

        Args:
            site: its name.
            over: of a mixture, the tokens ``"routed"`` to each expert, or ``"all"`` that passed.

        Raises:
            InputError: `over` is neither.
        """
        if over not in get_args(Over):
            raise InputError(f"over must be one of {', '.join(get_args(Over))}, got {over!r}")
        tokens = self.site_tokens(site)
        if site not in self.routed:
            return tokens
        routed = self.routed[site]
        return routed if over == "routed" else tokens[:, None].expand_as(routed)

    @property
    def counts(self) -> dict[str, torch.Tensor]:
        """Site -> tokens at which each neuron was active, int64 [labels, width].

        In a mixture, this and the others are [labels, experts, width].
        """
        return self._statistic("counts")

    @property
    def shard_counts(self) -> dict[str, torch.Tensor]:
        """Site -> the counts of each shard of the text, int32 [labels, SHARDS, ...] like those."""
        return self._statistic("shard_counts")

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """Site -> sum of each neuron's activations, float64 [labels, width]."""
        return self._statistic("sums")

    @property
    def square_sums(self) -> dict[str, torch.Tensor]:
        """Site -> sum of each neuron's squared products, float64 [labels, width]."""
        return self._statistic("square_sums")

    @property
    def up_abs_sums(self) -> dict[str, torch.Tensor]:
        """Site -> sum of the absolute values of `up`, float64 [labels, width]."""
        return self._statistic("up_abs_sums")

    def probabilities(self, label: str, over: Over = "routed") -> dict[str, torch.Tensor]:
        """Site -> share of the label's tokens at which each neuron is active, float64 [width].

        In a mixture [experts, width]: the share of the tokens ``"routed"`` to the neuron's expert,
        0 where there are none, or of ``"all"`` tokens.

        Raises:
            InputError: the profile has no such label, no counts, or no tokens of the label.
        """
        return self._per_token("counts", label, over)

    def means(self, label: str, over: Over = "routed") -> dict[str, torch.Tensor]:
        """Site -> mean activation over the label's tokens, float64 [width].

        In a mixture [experts, width], over the tokens ``"routed"`` to the neuron's expert, 0 where
        there are none, or over ``"all"`` tokens.

        Raises:
            InputError: the profile has no such label, no sums, or no tokens of the label.
        """
        return self._per_token("sums", label, over)

    def of_shards(self, chosen: torch.Tensor) -> Profile:
        """The counts of some shards alone, as a profile of their tokens.

        Args:
            chosen: integers [labels, n], the shards to take of each label; those of a label differ.

        Raises:
            InputError: the profile has no shard counts.
        """

        def summed(values: torch.Tensor) -> torch.Tensor:
            return torch.stack([of[row].sum(0) for of, row in zip(values, chosen, strict=True)])

        counts = {site: summed(values) for site, values in self.shard_counts.items()}
        seen = {name: summed(of) for name, of in self.shard_tokens.items()}
        routed = {site: seen.pop(site) for site in self.routed}
        return Profile(self.labels, self.site_info, seen, {"counts": counts}, self.metadata, routed)

    def published_counts(self) -> torch.Tensor:
        """The counts as int64 [layers, neurons, labels], as the published code stacks them.

        Raises:
            InputError: the sites' widths differ, or one is a mixture.
        """
        counts = self.counts
        if self.routed:
            raise InputError(
                "published counts hold dense layers only, but this model has mixtures of experts "
                f"({next(iter(self.routed))}); use counts[site] instead"
            )
        widths = {site.width for site in self.site_info}
        if len(widths) > 1:
            raise InputError(
                "published counts need one width for all layers, but this model's sites have "
                f"widths from {min(widths)} to {max(widths)}; use counts[site] instead"
            )
        return torch.stack([counts[site].T for site in self.sites])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as a safetensors file; the same profile gives the same bytes.

        Raises:
            InputError: the file cannot be written; then nothing is.
        """
        storage.write(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile.

        Raises:
            InputError: the file is missing, cut short, damaged, no profile, or of another format
                version.
        """
        existing_file(path, "profile")
        try:
            return cls(*storage.read(path))
        except InputError as error:
            raise InputError(f"cannot load {path}: {error}") from error

    def save_published(self, path: str | os.PathLike[str]) -> dict[str, str]:
        """Write one published count file per label, and return label -> path.

        Args:
            path: a path that holds `{label}`, such as `activation.{label}.train.llama-2-7b`; or a
                directory, in which files of that name are put, after the model's name.

        Raises:
            InputError: widths or token counts differ from site to site, a count does not fit the
                format's int32, or a file cannot be written.
        """
        return published.write(path, self)

    @classmethod
    def from_published(
        cls, files: Mapping[str, str | os.PathLike[str]], model: torch.nn.Module | None = None
    ) -> Profile:
        """Read published count files, which carry neither site names nor sums.

        Args:
            files: label -> path.
            model: the model that was counted, to name the sites. Without it they are known by
                position, and neurons found in the profile are bound to a model later.

        Raises:
            InputError: a file is not of that format, or the files or the model do not agree.
        """
        return cls(*published.read(files, model))

    def __add__(self, other: Profile) -> Profile:
        """Both profiles: a label in both is added, the others are taken over, in order.

        Raises:
            InputError: the profiles are of models, settings or statistics that differ, or some
                text of a label is in both.
        """
        if not isinstance(other, Profile):
            return NotImplemented
        self._check_addable(other)
        labels = list(dict.fromkeys(self.labels + other.labels))
        my_rows, their_rows = (
            torch.tensor([labels.index(label) for label in part.labels]) for part in (self, other)
        )

        def added(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            if mine.dtype is torch.int32:
                return narrowed(added(mine.long(), theirs.long()))
            total = mine.new_zeros(len(labels), *mine.shape[1:])
            return total.index_add_(0, my_rows, mine).index_add_(0, their_rows, theirs)

        tokens, shard_tokens = (
            {stack: added(of, theirs[stack]) for stack, of in mine.items()}
            for mine, theirs in (
                (self.stack_tokens, other.stack_tokens),
                (self.shard_tokens, other.shard_tokens),
            )
        )
        statistics = {
            name: {site: added(mine[site], other.statistics[name][site]) for site in mine}
            for name, mine in self.statistics.items()
        }
        routed = {site: added(mine, other.routed[site]) for site, mine in self.routed.items()}
        about_run = self._added_metadata(other)
        return Profile(labels, self.site_info, tokens, statistics, about_run, routed, shard_tokens)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per label, site and neuron.

        Columns: ``label``, ``site``, ``neuron`` and the profile's statistics, but for the shards'.
        Where there are mixtures, also ``expert`` (missing at dense sites), within which ``neuron``
        counts then, and ``routed``, the tokens that the neuron saw.
        """
        import pandas

        parts = []
        for site in self.site_info:
            flat, seen = torch.arange(site.neurons), self.seen_tokens(site.name)
            for row, label in enumerate(self.labels):
                columns = {"label": label, "site": site.name}
                if self.routed:
                    experts = (flat // site.width).tolist() if site.experts else [None] * len(flat)
                    columns["expert"] = pandas.array(experts, dtype="Int64")
                columns["neuron"] = flat % site.width
                if self.routed:
                    columns["routed"] = seen[row, ..., None].expand(site.shape).flatten()
                columns |= {
                    name: of[site.name][row].flatten()
                    for name, of in self.statistics.items()
                    if name != "shard_counts"
                }
                parts.append(pandas.DataFrame(columns))
        return pandas.concat(parts, ignore_index=True)

    def _repr_html_(self) -> str:
        width = sum(site.neurons for site in self.site_info)
        header, rows, shades = ["label", "tokens"], [], None
        for label, count in zip(self.labels, self.tokens.tolist(), strict=True):
            rows.append([label, f"{count:,}"])
        if "counts" in self.statistics and all(of.all() for of in self.stack_tokens.values()):
            header.append("active at a token")
            means = [
                sum(float(one.sum()) for one in self.probabilities(label).values()) / width
                for label in self.labels
            ]
            shades = [[mean] for mean in means]
            rows = [[*row, f"{mean:.1%}"] for row, mean in zip(rows, means, strict=True)]
        return display.table(
            f"Profile of {len(self._sites)} sites, {width:,} neurons", header, rows, shades
        )

    def __repr__(self) -> str:
        tokens = ", ".join(
            f"{label}: {count}"
            for label, count in zip(self.labels, self.tokens.tolist(), strict=True)
        )
        return f"Profile({', '.join(self.statistics)} of {len(self._sites)} sites; {tokens} tokens)"

    def _statistic(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.statistics:
            raise InputError(
                f"this profile holds {', '.join(self.statistics)} but no {name}; "
                f"profile the model with statistics that include {name!r}"
            )
        return self.statistics[name]

    def _per_token(self, name: str, label: str, over: Over) -> dict[str, torch.Tensor]:
        if label not in self.labels:
            raise InputError(
                f"this profile has no label {label!r}; its labels are {', '.join(self.labels)}"
            )
        row = self.labels.index(label)
        if any(int(tokens[row]) == 0 for tokens in self.stack_tokens.values()):
            raise InputError(f"this profile has no tokens of label {label!r}; add some text of it")
        # An expert that no token reached was active at none of them: 0 / 1.
        return {
            site: values[row].to(torch.float64)
            / self.seen_tokens(site, over)[row, ..., None].clamp(min=1)
            for site, values in self._statistic(name).items()
        }

    def _check_structure(self) -> None:
        if not self.labels or not all(isinstance(name, str) and name for name in self.labels):
            raise InputError(f"a profile needs labels that are strings, got {self.labels}")
        if len(set(self.labels)) < len(self.labels):
            raise InputError(f"the labels of a profile must be distinct, got {self.labels}")
        if not self.site_info or len(self._sites) < len(self.site_info):
            raise InputError(
                f"a profile needs sites of distinct names, got {[s.name for s in self.site_info]}"
            )
        stacks = {site.stack for site in self.site_info}
        if set(self.stack_tokens) != stacks:
            raise InputError(
                f"tokens of the stacks {sorted(stacks)} are needed, got {sorted(self.stack_tokens)}"
            )
        for stack, tokens in self.stack_tokens.items():
            if tokens.dtype != torch.int64 or tokens.shape != (len(self.labels),):
                raise InputError(
                    f"tokens of stack {stack} must be int64 [labels] = [{len(self.labels)}], "
                    f"got {tokens.dtype} {list(tokens.shape)}"
                )
            if (tokens < 0).any():
                raise InputError(f"tokens of stack {stack} must not be negative")

    def _checked_routed(self, routed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mixtures = {site.name: site.experts for site in self.site_info if site.experts}
        if routed.keys() != mixtures.keys():
            raise InputError(
                f"routed must hold the profile's mixtures, {list(mixtures)}, got {list(routed)}"
            )
        for site, experts in mixtures.items():
            tensor = routed[site] = routed[site].detach().cpu().contiguous()
            shape = (len(self.labels), experts)
            if tensor.dtype != torch.int64 or tensor.shape != shape:
                raise InputError(
                    f"routed of site {site} must be int64 [labels, experts] = {list(shape)}, got "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )
            if (tensor < 0).any() or (tensor > self.site_tokens(site)[:, None]).any():
                raise InputError(
                    f"routed of site {site} must be between 0 and the label's tokens, but one is "
                    "not"
                )
        return routed

    def _checked(self, name: str, site: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if name not in STATISTICS:
            raise InputError(
                f"a profile holds {', '.join(STATISTICS)}, but {name!r} was given; leave it out"
            )
        if values.keys() != self._sites.keys():
            raise InputError(f"{name} must hold the profile's sites, all of them and no other")
        tensor = values[site].detach().cpu().contiguous()
        shards = {"shard_counts": (SHARDS,)}.get(name, ())
        shape = (len(self.labels), *shards, *self._sites[site].shape)
        if tensor.dtype != STATISTICS[name] or tensor.shape != shape:
            mixture = "experts, " if self._sites[site].experts else ""
            raise InputError(
                f"{name} of site {site} must be {STATISTICS[name]} [labels, "
                f"{'shards, ' if shards else ''}{mixture}width] = {list(shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        if name == "counts":
            if (tensor < 0).any():
                raise InputError(f"counts of site {site} must not be negative")
            if (tensor > self.seen_tokens(site)[..., None]).any():
                raise InputError(
                    f"counts of site {site} must not exceed the label's tokens, but one does"
                )
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{name} of site {site} must be finite, but one is not")
        return tensor

    def _check_addable(self, other: Profile) -> None:
        for key in _SHARED[1:]:
            mine, theirs = self.metadata.get(key), other.metadata.get(key)
            if None not in (mine, theirs) and mine != theirs:
                if key == "fingerprint":
                    models = " and ".join(
                        f"{one.metadata.get('model') or 'one without a name'} "
                        f"(fingerprint {one.metadata[key][:12]})"
                        for one in (self, other)
                    )
                    raise InputError(
                        f"profiles of models that differ cannot be added: {models}; "
                        "profile both texts with one model"
                    )
                raise InputError(
                    f"profiles with {key} {mine} and {theirs} cannot be added; "
                    "profile both texts with one model and one setting"
                )
        for mine, theirs in zip(self.site_info, other.site_info, strict=False):
            if mine != theirs:
                raise InputError(
                    f"profiles of models that differ cannot be added: one has the site {mine} "
                    f"where the other has {theirs}"
                )
        if len(self.site_info) != len(other.site_info):
            raise InputError(
                f"profiles of models that differ cannot be added: one has {len(self.site_info)} "
                f"sites and the other {len(other.site_info)}"
            )
        if self.statistics.keys() != other.statistics.keys():
            raise InputError(
                f"profiles of {', '.join(self.statistics)} and of {', '.join(other.statistics)} "
                "cannot be added; profile both texts with the same statistics"
            )
        for mine in _corpora(self):
            for theirs in _corpora(other):
                if _overlap(mine, theirs):
                    parts = [one.get("part") for one in (mine, theirs)]
                    if all(parts) and parts[0]["number"] != parts[1]["number"]:
                        raise InputError(
                            f"profiles of parts that were not made in one way cannot be added: "
                            f"{_way(mine)} and {_way(theirs)} of {mine['source']}; make all parts "
                            "with one number of parts, batch_size and seq_len"
                        )
                    raise InputError(
                        f"profiles that share text cannot be added: rows {mine['rows']} and "
                        f"{theirs['rows']} of {mine['source']} would be counted twice for label "
                        f"{mine['label']!r}; leave one out"
                    )

    def _added_metadata(self, other: Profile) -> dict[str, Any]:
        shared = {}
        for key in _SHARED:
            known = self.metadata.get(key)
            shared[key] = other.metadata.get(key) if known is None else known
        corpora = _corpora(self) + _corpora(other)
        return {**shared, "corpora": corpora, "runs": _runs(self) + _runs(other)}


def _corpora(profile: Profile) -> list[dict[str, Any]]:
    """The corpus entries, each with the row length that its row range is measured in."""
    length = profile.metadata.get("seq_len")
    return [{"seq_len": length, **entry} for entry in profile.metadata.get("corpora", ())]


def _overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two corpus entries hold some text in common under one label."""
    # The text itself is known by its identity; names alone may be the same by chance.
    known = "identity" if a.get("identity") and b.get("identity") else "source"
    if a.get(known) is None or a[known] != b.get(known) or a["label"] != b["label"]:
        return False
    if _other_part(a, b):
        return False
    if not (a["seq_len"] and b["seq_len"]):
        a, b = {**a, "seq_len": 1}, {**b, "seq_len": 1}
    # Rows of two lengths are no common measure: compared are their places in the token stream.
    starts, stops = zip(
        *([row * entry["seq_len"] for row in entry["rows"]] for entry in (a, b)), strict=True
    )
    return max(starts) < min(stops)


def _other_part(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two entries are different parts of one text that was divided in one way."""
    ways = [
        (entry["seq_len"], *(entry.get("part", {}).get(name) for name in ("of", "batch_size")))
        for entry in (a, b)
    ]
    return "part" in a and ways[0] == ways[1] and a["part"]["number"] != b["part"]["number"]


def _way(entry: Mapping[str, Any]) -> str:
    part = entry["part"]
    return (
        f"part {part['number']} of {part['of']} (batches of {part['batch_size']} rows of "
        f"{entry['seq_len']})"
    )


def _runs(profile: Profile) -> list[dict[str, Any]]:
    """The settings of the runs that a profile came from, each without what all of them share."""
    if "runs" in profile.metadata:
        return profile.metadata["runs"]
    apart = (*_SHARED, "corpora")
    return [{key: value for key, value in profile.metadata.items() if key not in apart}]

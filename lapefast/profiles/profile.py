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
from lapefast.profiles import addition, published, storage
from lapefast.profiles.shards import check_shards
from lapefast.profiles.statistics import check_structure, checked_routed, checked_statistic

__all__ = ["Over", "Profile"]

Over = Literal["routed", "all"]
"""Which tokens a mixture's statistics are shares of: those routed to each expert, or all."""


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
        check_structure(self)
        self.routed = checked_routed(self, routed or {})
        """Mixture -> the label's tokens that each expert saw, int64 [labels, experts]."""
        self.shard_tokens = {
            name: count.detach().cpu() for name, count in (shard_tokens or {}).items()
        }
        self.statistics = {
            name: checked_statistic(self, name, values) for name, values in statistics.items()
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
        return Profile(*addition.added(self, other))

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

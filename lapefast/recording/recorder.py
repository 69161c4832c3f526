"""A recorder, and how it is placed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lapefast
from lapefast.errors import InputError
from lapefast.models.bare import stacks, unwrap
from lapefast.models.fingerprint import fingerprint, weights_digest
from lapefast.models.groups import token_groups
from lapefast.models.inputs import input_device
from lapefast.models.parallel import leads, parallel_size
from lapefast.models.placed import SiteState, SiteStatistics
from lapefast.models.placement import Placement, chosen_backend, device_of
from lapefast.models.rows import rows_at
from lapefast.models.sites import Site
from lapefast.models.structure import FFN
from lapefast.profiles import SHARDS, STATISTICS, Profile
from lapefast.profiles.shards import narrowed
from lapefast.recording.checks import (
    check_flags,
    check_labels,
    check_statistics,
    check_threshold,
)
from lapefast.recording.groups import StackGroups

_log = logging.getLogger(__name__)


def record(
    model: nn.Module,
    labels: Sequence[str],
    statistics: Sequence[str] = ("counts",),
    threshold: float = 0.0,
    exact: bool = True,
    backend: str | None = None,
) -> Recorder:
    """Place a recorder in ``model``.

    Placing runs a few tokens through the model, in ``eval()``, to prove itself beside the model's
    own forwards; hooks of others on the model see that pass too.

    Args:
        model: any model whose FFNs `lapefast.models.find_sites` finds.
        labels: what the tokens are grouped by.
        statistics: of ``counts``, ``sums`` (of activations), ``square_sums`` (of squared products)
            and ``up_abs_sums`` (of the absolute values of up; gated FFNs only), and
            ``shard_counts`` (the counts of each of 8 shards, with ``counts`` beside them: row r of
            a label, counted over the whole run, goes to shard r % 8; while it runs, every
            statistic then takes 8 times its memory).
        threshold: a neuron is active where its activation is strictly above it.
        exact: fuse only activations proven bit-equal to the model's own; otherwise all that a
            kernel exists for.
        backend: who computes the ops; None takes ``LAPEFAST_BACKEND`` or the best for the device.

    Returns:
        A context manager; ``recorder.set(...)`` before each forward, ``recorder.profile()`` inside
        or after.

    Raises:
        InputError: where the model has no FFNs that can be handled, or holds a recorder already.
    """
    return Recorder(model, labels, statistics, threshold, exact, backend)


class Recorder:
    """See `record`."""

    def __init__(
        self,
        model: nn.Module,
        labels: Sequence[str],
        statistics: Sequence[str] = ("counts",),
        threshold: float = 0.0,
        exact: bool = True,
        backend: str | None = None,
    ) -> None:
        self.labels = check_labels(labels)
        self._names = check_statistics(statistics)
        self._shards = SHARDS if "shard_counts" in self._names else 1
        self._threshold = check_threshold(threshold)
        self._exact, self._backend = exact, backend
        self._statistics: dict[str, SiteStatistics] = {}
        self._stacks: dict[str, StackGroups] = {}
        self._marked: list[tuple[Tensor, Tensor]] = []
        self._placement = Placement.claim(
            model, "recorder", self, f"labels {', '.join(self.labels)}"
        )
        try:
            # Statistics made in inference mode could not be added to outside of it.
            with torch.inference_mode(False):
                for name, module in stacks(self._placement.bare).items():
                    self._stacks[name] = StackGroups(
                        module,
                        (len(self.labels), self._shards),
                        input_device(model),
                        self._placement,
                    )
                self._placement.fill(self._place)
            self._placement.prove()
            self.sites = self._placement.sites()
            self._metadata = self._describe(model)
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of what is recorded."""
        return self._names

    @property
    def about(self) -> dict[str, Any]:
        """What a profile says of the model and of how it is run, as JSON."""
        return self._metadata | {
            "dtype": self._placement.dtype(),
            "edited": self._placement.steered,
        }

    @property
    def experts_implementation(self) -> str | None:
        """How transformers ran mixtures so far, such as ``grouped_mm``, joined by + if by several.

        Before any ran, how it would; None where the model has none.
        """
        return self._placement.experts_implementation()

    @property
    def unproven(self) -> list[str]:
        """Sites that no token has reached yet, so that they were not compared with the original."""
        return [name for name, state in self._placement.states.items() if not state.proven]

    @property
    def how(self) -> dict[str, str]:
        """Site -> "fused" (the kernel computes the activation) or "given" (the model's module)."""
        return self._placement.how()

    def set(
        self,
        label: str | None = None,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        decoder_groups: Tensor | None = None,
        first_row: int | None = None,
    ) -> None:
        """Say what the tokens of the next forward passes are.

        Args:
            label: the label of every token.
            mask: [batch, length] as the model's attention mask: 0 is padding and counts nowhere.
                None counts every token.
            groups: instead of a label, an integer tensor like the input ids: each token's index
                into ``labels``, or -1.
            decoder_mask, decoder_groups: the same for the decoder's input of an encoder-decoder.
            first_row: with a label, the number of the batch's first row among all of the label's,
                from 0, by which ``shard_counts`` deals the rows. None goes on from the last
                batch's; passes that continue its sequences, from a cache, are of the same rows.

        Raises:
            InputError: for an unknown label, an index out of range, not just one of label and
                groups, or a row number without a label or below 0.
        """
        given = label, mask, groups, decoder_mask, decoder_groups
        if first_row is not None and (label is None or first_row < 0):
            raise InputError(
                f"first_row must be the number, from 0, of a label's row, got {first_row} with "
                f"label {label!r}"
            )
        for name, index in token_groups(self.labels, self._stacks, *given).items():
            self._stacks[name].set(index)
            if first_row is not None:
                self._stacks[name].next_row[self.labels.index(label)] = first_row

    def profile(self) -> Profile:
        """What was counted so far, as a `Profile` of its own.

        Raises:
            InputError: where an activation was not finite (naming the site), or nothing was
                counted.
        """
        dealt = {
            name: rows.tokens[1:].to("cpu", copy=True).view(len(self.labels), self._shards)
            for name, rows in self._stacks.items()
        }
        tokens = {name: of.sum(1) for name, of in dealt.items()}
        if not any(int(count.sum()) for count in tokens.values()):
            raise InputError(
                "nothing was recorded: call recorder.set(...) and run the model before "
                "recorder.profile()"
            )
        self.check()
        counted = {site.name: self._read(site.name) for site in self.sites}
        sites = self._reached(counted)
        collected = {
            name: {
                site.name: counted[site.name][name].cpu()
                for site in sites
                if name in counted[site.name]
            }
            for name in (*self._names, "routed", "shard_routed")
        }
        routed = collected.pop("routed")
        metadata = self.about
        dealt |= collected.pop("shard_routed")
        if routed:
            metadata["experts_implementation"] = self.experts_implementation
        shard_tokens = dealt if self._shards > 1 else None
        return Profile(self.labels, sites, tokens, collected, metadata, routed, shard_tokens)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything in which it adds up, by name; added to in place, never replaced.

        `tokens/{stack}` int64 [1 + groups] (the first place is of no group), `flags/{site}` int64
        [2], and `{statistic}/{site}` [groups, neurons], in a mixture [groups, experts, neurons] and
        `routed/{site}` [groups, experts]; each where its site lies. A group is a label, or with
        ``shard_counts`` a shard of one. What runs added up in several processes, or before and
        after a stop, is the sum of these.
        """
        named = {f"tokens/{stack}": rows.tokens for stack, rows in self._stacks.items()}
        for site, statistics in self._statistics.items():
            named[f"flags/{site}"] = statistics.flags
            named |= {f"{name}/{site}": one for name, one in self._by_group(site).items()}
        return named

    def whole(self) -> dict[str, Tensor]:
        """The same with the neurons of every process that splits the layers; a collective."""
        tensors = self.tensors
        for site in self._statistics:
            for name, tensor in self._whole(site).items():
                tensors[f"{name}/{site}"] = tensor
        return tensors

    def restore(self, whole: Mapping[str, Tensor]) -> None:
        """Put back what `whole` gave.

        Raises:
            InputError: it is of another model or other statistics.
        """
        tensors = self.tensors
        parts = {name: self._own(name, tensor) for name, tensor in whole.items()}
        if {name: one.shape for name, one in tensors.items()} != {
            name: one.shape for name, one in parts.items()
        }:
            raise InputError("what was counted before is of another model or other statistics")
        for name, tensor in tensors.items():
            tensor.copy_(parts[name])

    def mark(self, label: str) -> None:
        """Remember what was counted, so that `rewind` can take back passes over ``label`` alone."""
        first = self.labels.index(label) * self._shards
        self._marked = []
        for name, tensor in self.tensors.items():
            kind = name.partition("/")[0]
            groups = slice(first, first + self._shards)
            part = tensor if kind in ("tokens", "flags") else tensor[groups]
            self._marked.append((part, part.clone()))

    def unmark(self) -> None:
        """Forget the last `mark`."""
        self._marked = []

    def rewind(self) -> None:
        """Take back what was counted since the last `mark`; nothing, if there is none."""
        for part, before in self._marked:
            part.copy_(before)

    def drain(self) -> dict[str, dict[str, Tensor]]:
        """Site -> statistic -> [labels, neurons], as counted since the last call, and start anew.

        Of a mixture [labels, experts, neurons], and its ``routed`` [labels, experts].

        For passes that look at every batch apart. On the sites' own devices.

        Raises:
            InputError: where an activation was not finite.
        """
        drained = {}
        try:
            self.check()
        finally:
            for site, statistics in self._statistics.items():
                drained[site] = self._read(site)
                for tensor in (*statistics.tensors().values(), statistics.flags):
                    tensor.zero_()
        return drained

    def check(self) -> None:
        """Raise InputError, naming the site, if an activation was not finite so far."""
        for site, statistics in self._statistics.items():
            columns = self._placement.states[site].columns
            flags = statistics.flags if columns is None else columns.total(statistics.flags)
            check_flags(site, flags)

    def check_reads_ids(self) -> None:
        """Raise InputError where the model does not run on token ids alone."""
        if self._placement.failure is not None:
            raise InputError(
                "the model does not run on rows of token ids alone, so no text can pass through it "
                f"({self._placement.failure}); record in a loop of your own, by lf.record"
            )

    def end_at_last_site(self) -> None:
        """Let the last FFN stop at its activation, where the model's output is not wanted.

        The forward pass then returns nothing meaningful. For the pass over a corpus.
        """
        for site in self.sites:
            if site.name == self._placement.last and site.calls == 1 and not site.experts:
                self._statistics[site.name].last = True

    def remove(self) -> None:
        """Take the recorder out of the model; what it counted stays readable. Safe to repeat."""
        for rows in self._stacks.values():
            rows.remove()
        self._placement.release("recorder", "statistics", self)

    def _read(self, site: str) -> dict[str, Tensor]:
        """A copy of each statistic, [labels, ...], and with shards of what they hold apart."""
        apart = {
            name: tensor.unflatten(0, (len(self.labels), self._shards))
            for name, tensor in self._whole(site).items()
        }
        read = {name: tensor.sum(1) for name, tensor in apart.items()}
        if self._shards > 1:
            read["shard_counts"] = narrowed(apart["counts"])
            read |= {"shard_routed": apart["routed"].clone()} if "routed" in apart else {}
        return read

    def _whole(self, site: str) -> dict[str, Tensor]:
        """Each statistic as in `tensors`, of the neurons of all processes that split the layers."""
        columns, tensors = self._placement.states[site].columns, self._by_group(site)
        if columns is None:
            return tensors
        return {name: columns.gather(own) for name, own in tensors.items()}

    def _own(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a tensor of `whole`."""
        kind, _, site = name.partition("/")
        state = self._placement.states.get(site)
        if state is None or state.columns is None or kind == "flags":
            return whole
        return whole[..., state.columns.start : state.columns.stop]

    def _reached(self, counted: dict[str, dict[str, Tensor]]) -> list[Site]:
        """The sites without those that no token has reached, such as a vision tower's."""
        unproven = set(self.unproven)
        left_out = [
            site.name
            for site in self.sites
            if site.name in unproven
            and not any(bool(tensor.any()) for tensor in counted[site.name].values())
        ]
        if len(left_out) == len(self.sites):
            raise InputError("no FFN ran, so nothing was recorded; does the model use its FFNs?")
        if left_out:
            _log.warning("Not in the profile, as no token reached them: %s", ", ".join(left_out))
        return [site for site in self.sites if site.name not in left_out]

    def _by_group(self, site: str) -> dict[str, Tensor]:
        """Each statistic, [groups, ...]; in a mixture [groups, experts, ...]."""
        return self._statistics[site].by_group(len(self.labels) * self._shards)

    def _place(self, ffn: FFN, state: SiteState) -> None:
        site, device = ffn.site, device_of(ffn)
        if state.form is None:
            refused = {"up_abs_sums"} | ({"square_sums"} if ffn.gated else set())
            for name in self._names:
                if name in refused:
                    raise InputError(
                        f"{name} can't be recorded at {site.name}: {type(ffn.owner).__name__} "
                        "computes its product in its own code"
                    )
        groups = len(self.labels) * self._shards * (site.experts or 1)
        tensors = {
            name: torch.zeros(groups, state.width, dtype=STATISTICS[name], device=device)
            for name in self._names
            if name != "shard_counts"  # the counts, before their shards are added up
        }
        if site.experts:
            tensors["routed"] = torch.zeros(groups, dtype=torch.int64, device=device)
        state.statistics = self._statistics[site.name] = SiteStatistics(
            groups=rows_at(site, self._stacks[site.stack].index_on(device)),
            threshold=self._threshold,
            flags=torch.zeros(2, dtype=torch.int64, device=device),
            backend=chosen_backend(self._backend, device),
            exact=self._exact,
            **tensors,
        )

    def _describe(self, model: nn.Module) -> dict[str, Any]:
        config = getattr(unwrap(model), "config", None)
        size = parallel_size(model)
        if size > 1 and leads():
            _log.warning(
                "Tensor parallelism over %d processes adds up a layer's output in another order "
                "than one process does, so activations next to the threshold may change sides",
                size,
            )
        return {
            **({"tensor_parallel": size} if size > 1 else {}),
            "model": getattr(config, "_name_or_path", "") or type(unwrap(model)).__name__,
            "architecture": type(unwrap(model)).__name__,
            "fingerprint": fingerprint(model),
            "weights": weights_digest(model),
            "threshold": self._threshold,
            "exact": self._exact,
            "device": input_device(model).type,
            "attention_implementation": getattr(config, "_attn_implementation", None),
            "threads": torch.get_num_threads(),
            "versions": {
                "lapefast": lapefast.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

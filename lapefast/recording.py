"""A recorder: the statistics ops placed in a model, for one's own loop or for the pass."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lapefast
from lapefast.errors import InputError
from lapefast.models.bare import stacks, unwrap
from lapefast.models.fingerprint import fingerprint
from lapefast.models.groups import token_groups
from lapefast.models.inputs import input_device
from lapefast.models.placed import SiteState, SiteStatistics, in_backward
from lapefast.models.placement import Placement, chosen_backend, device_of, dtype_of
from lapefast.models.rows import StackRows
from lapefast.models.sites import Site
from lapefast.models.structure import FFN
from lapefast.models.traces import GROUPS
from lapefast.profiles import STATISTICS, Profile

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
            and ``up_abs_sums`` (of the absolute values of up; gated FFNs only).
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
        self.labels = _check_labels(labels)
        self._names = check_statistics(statistics)
        self._threshold = check_threshold(threshold)
        self._exact, self._backend = exact, backend
        self._statistics: dict[str, SiteStatistics] = {}
        self._stacks: dict[str, _StackGroups] = {}
        self._placement = Placement.claim(
            model, "recorder", self, f"labels {', '.join(self.labels)}"
        )
        try:
            # Statistics made in inference mode could not be added to outside of it.
            with torch.inference_mode(False):
                for name, module in stacks(self._placement.bare).items():
                    self._stacks[name] = _StackGroups(
                        module, len(self.labels), input_device(model), self._placement
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
    ) -> None:
        """Say what the tokens of the next forward passes are.

        Args:
            label: the label of every token.
            mask: [batch, length] as the model's attention mask: 0 is padding and counts nowhere.
                None counts every token.
            groups: instead of a label, an integer tensor like the input ids: each token's index
                into ``labels``, or -1.
            decoder_mask, decoder_groups: the same for the decoder's input of an encoder-decoder.

        Raises:
            InputError: for an unknown label, an index out of range, or not just one of label and
                groups.
        """
        given = label, mask, groups, decoder_mask, decoder_groups
        for name, index in token_groups(self.labels, self._stacks, *given).items():
            self._stacks[name].set(index)

    def profile(self) -> Profile:
        """What was counted so far, as a `Profile` of its own.

        Raises:
            InputError: where an activation was not finite (naming the site), or nothing was
                counted.
        """
        tokens = {name: rows.tokens[1:].to("cpu", copy=True) for name, rows in self._stacks.items()}
        if not any(int(count.sum()) for count in tokens.values()):
            raise InputError(
                "nothing was recorded: call recorder.set(...) and run the model before "
                "recorder.profile()"
            )
        self.check()
        sites = self._reached()
        collected = {
            name: {
                site.name: getattr(self._statistics[site.name], name).to("cpu", copy=True)
                for site in sites
            }
            for name in self._names
        }
        metadata = self._metadata | {
            "dtype": self._placement.dtype(),
            "edited": self._placement.steered,
        }
        return Profile(self.labels, sites, tokens, collected, metadata)

    def drain(self) -> dict[str, dict[str, Tensor]]:
        """Site -> statistic -> [labels, neurons], as counted since the last call, and start anew.

        For passes that look at every batch apart. On the sites' own devices.

        Raises:
            InputError: where an activation was not finite.
        """
        drained = {}
        try:
            self.check()
        finally:
            for site, statistics in self._statistics.items():
                tensors = statistics.tensors()
                drained[site] = {name: tensor.clone() for name, tensor in tensors.items()}
                for tensor in (*tensors.values(), statistics.flags):
                    tensor.zero_()
        return drained

    def check(self) -> None:
        """Raise InputError, naming the site, if an activation was not finite so far."""
        for site, statistics in self._statistics.items():
            check_flags(site, statistics.flags)

    def end_at_last_site(self) -> None:
        """Let the last FFN stop at its activation, where the model's output is not wanted.

        The forward pass then returns nothing meaningful. For the pass over a corpus.
        """
        for site in self.sites:
            if site.name == self._placement.last and site.calls == 1:
                self._statistics[site.name].last = True

    def remove(self) -> None:
        """Take the recorder out of the model; what it counted stays readable. Safe to repeat."""
        for rows in self._stacks.values():
            rows.remove()
        self._placement.release("recorder", "statistics", self)

    def _reached(self) -> list[Site]:
        """The sites without those that no token has reached, such as a vision tower's."""
        unproven = set(self.unproven)
        left_out = [
            site.name
            for site in self.sites
            if site.name in unproven
            and not any(bool(t.any()) for t in self._statistics[site.name].tensors().values())
        ]
        if len(left_out) == len(self.sites):
            raise InputError("no FFN ran, so nothing was recorded; does the model use its FFNs?")
        if left_out:
            _log.warning("Not in the profile, as no token reached them: %s", ", ".join(left_out))
        return [site for site in self.sites if site.name not in left_out]

    def _place(self, ffn: FFN, state: SiteState) -> None:
        site, device = ffn.site, device_of(ffn)
        if dtype_of(ffn) not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(
                f"{site.name} computes in {dtype_of(ffn)}; lapefast takes float32, float16 and "
                "bfloat16 models, so load it in one of these"
            )
        if state.form is None:
            refused = {"up_abs_sums"} | ({"square_sums"} if ffn.gated else set())
            for name in self._names:
                if name in refused:
                    raise InputError(
                        f"{name} can't be recorded at {site.name}: {type(ffn.owner).__name__} "
                        "computes its product in its own code"
                    )
        tensors = {
            name: torch.zeros(len(self.labels), site.width, dtype=STATISTICS[name], device=device)
            for name in self._names
        }
        state.statistics = self._statistics[site.name] = SiteStatistics(
            groups=self._stacks[site.stack].index_on(device),
            threshold=self._threshold,
            flags=torch.zeros(2, dtype=torch.int64, device=device),
            backend=chosen_backend(self._backend, device),
            exact=self._exact,
            **tensors,
        )

    def _describe(self, model: nn.Module) -> dict[str, Any]:
        config = getattr(unwrap(model), "config", None)
        return {
            "model": getattr(config, "_name_or_path", "") or type(unwrap(model)).__name__,
            "architecture": type(unwrap(model)).__name__,
            "fingerprint": fingerprint(model),
            "threshold": self._threshold,
            "exact": self._exact,
            "threads": torch.get_num_threads(),
            "versions": {
                "lapefast": lapefast.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


class _StackGroups(StackRows):
    """The rows of one stack's input: their groups, and how many tokens each group had."""

    def __init__(
        self, module: nn.Module, labels: int, device: torch.device, placement: Placement
    ) -> None:
        # The first place is for -1, so that counting needs no selection.
        self.tokens = torch.zeros(labels + 1, dtype=torch.int64, device=device)
        self._shape: torch.Size | None = None
        self._lock = threading.Lock()
        self._placement = placement
        super().__init__(module, device, GROUPS)

    def set(self, groups: Tensor) -> None:
        """Take the group of each token, [batch, length], or of all, [1]."""
        self._shape = tuple(groups.shape) if groups.dim() == 2 else None
        groups = groups.reshape(-1)
        for device, held in self.indices.items():
            if held.tensor is None or held.tensor.shape != groups.shape:
                with torch.inference_mode(False):
                    held.tensor = torch.empty(groups.shape, dtype=torch.int32, device=device)
            held.tensor.copy_(groups)  # one address while the shape stays, for compiled graphs

    def before_forward(self, batch: int, length: int, options: dict[str, Any]) -> None:
        if self._placement.probing or (not torch.compiler.is_compiling() and in_backward()):
            return
        index = self.indices[self.device].tensor
        if index is None:
            raise InputError(
                "the recorder does not know these tokens: call recorder.set(...) before the model"
            )
        if self._shape is not None and (batch, length) != self._shape:
            raise InputError(
                f"the model's input is {[batch, length]} tokens, but recorder.set was given "
                f"{list(self._shape)}; call it before each forward pass"
            )
        rows = batch * length
        one = torch.ones(1, dtype=torch.int64, device=index.device).expand(rows)
        place = (index.long() + 1).expand(rows)
        if torch.compiler.is_compiling():
            self.tokens.index_add_(0, place, one)
        else:
            with self._lock:  # torch lets other threads run while it adds
                self.tokens.index_add_(0, place, one)


def _check_labels(labels: Sequence[str]) -> list[str]:
    if isinstance(labels, str) or not labels or not all(isinstance(one, str) for one in labels):
        raise InputError(f"labels must be a list of names, got {labels!r}")
    if len(set(labels)) != len(labels):
        raise InputError(f"labels must differ, got {', '.join(labels)}")
    return list(labels)


def check_flags(site: str, flags: Tensor) -> None:
    """Raise InputError for what the statistics ops counted in `flags`, int64 [2], at a site."""
    non_finite, outside = flags.tolist()
    if non_finite:
        raise InputError(
            f"{site}: {non_finite} activations are not finite (NaN or infinite), so what "
            "they count means nothing; check the model's weights or use a wider dtype"
        )
    if outside:
        raise InputError(f"{site}: {outside} group indices lie outside the labels")


def check_statistics(statistics: Sequence[str]) -> tuple[str, ...]:
    """The statistics in the order of `STATISTICS`. Raises InputError for unknown ones, or none."""
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    unknown = [name for name in names if name not in STATISTICS]
    if unknown or not names:
        raise InputError(
            f"statistics must be some of {', '.join(STATISTICS)}, got {unknown or 'none'}"
        )
    return tuple(name for name in STATISTICS if name in names)


def check_threshold(threshold: float) -> float:
    """The threshold as a number. Raises InputError for what is none."""
    try:
        number = float(threshold)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number:
        raise InputError(f"threshold must be a number, got {threshold!r}")
    return number

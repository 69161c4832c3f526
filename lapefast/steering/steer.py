"""Edits placed in a model: one for every sequence, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lapefast import ops
from lapefast.errors import InputError
from lapefast.models.bare import stack_of, stacks
from lapefast.models.columns import Columns
from lapefast.models.inputs import input_device
from lapefast.models.linears import find_linears, out_features
from lapefast.models.placed import SiteEdits, SiteState
from lapefast.models.placement import Placement, chosen_backend, device_of
from lapefast.models.rows import RowIndex, rows_at
from lapefast.models.sites import Site
from lapefast.models.structure import FFN
from lapefast.neurons import Edit, bind_all
from lapefast.steering.generation import Generation
from lapefast.steering.outputs import PlacedOutputs
from lapefast.steering.sequences import WHERE, StackSets, Where
from lapefast.steering.shifts import PlacedShifts, Shift

Steer = Edit | Shift
"""What a sequence can be steered by."""


def steer(
    model: nn.Module,
    edit: Steer | Sequence[Steer | None],
    where: Where = "all",
    exact: bool = True,
    backend: str | None = None,
) -> Steering:
    """Place edits in ``model``: their neurons' activations become ``scale * a + shift``.

    Each sequence of the model's input has its own edit where a list is given. Inside `generate`,
    whose beams and returned sequences multiply the input, a batch of k times as many sequences has
    k consecutive ones for each edit: every prompt one edit, or every prompt equally many. Outside,
    the numbers must match. With a list, or with ``where``, one forward pass runs at a time: threads
    that generate at once need a model each.

    Args:
        model: any model whose FFNs `lapefast.models.find_sites` finds; the one whose `generate` is
            called, so that it is seen.
        edit: made by `lapefast.deactivate`, `activate`, `scale` or `add`, and joined by ``|``; or a
            list of such, one per sequence of the batch, with None for a sequence without. Those
            that know their sites by position only are bound to the model here. A `Shift` of the
            residual stream may stand wherever an edit may.
        where: at which positions the edits hold. ``"prompt"``: those given as input;
            ``"generated"``: those of new tokens; ``"all"``: both. Outside `generate`, what goes on
            from a filled cache is taken for generated and everything else for the prompt. In an
            encoder every position is the prompt's.
        exact: fuse only activations proven bit-equal to the model's own; otherwise all that a
            kernel exists for.
        backend: who computes the op; None takes ``LAPEFAST_BACKEND`` or the best for the device.

    Returns:
        A context manager; leaving it, or ``remove()``, gives the model its own forwards back.

    Raises:
        InputError: where an edit does not fit the model, or it is steered already; while steered,
            where a batch does not match the edits.
    """
    return Steering(model, edit, where, exact, backend)


class Steering:
    """See `steer`.

    Attributes:
        edits: the edits and shifts that differ, bound to the model.
    """

    def __init__(
        self,
        model: nn.Module,
        edit: Steer | Sequence[Steer | None],
        where: Where = "all",
        exact: bool = True,
        backend: str | None = None,
    ) -> None:
        given = _check_edits(edit)
        if where not in WHERE:
            raise InputError(f"where must be one of {', '.join(WHERE)}, got {where!r}")
        # An edit that many sequences share has one table.
        different = list({id(one): one for one in given if one is not None}.values())
        edits = iter(bind_all([one for one in different if isinstance(one, Edit)], model))
        self.edits = [
            next(edits) if isinstance(one, Edit) else one.bind(model) for one in different
        ]
        sets = [-1 if one is None else _position(one, different) for one in given]
        self._exact, self._backend = exact, backend
        self._stacks: dict[str, StackSets] = {}
        self._generation: Generation | None = None
        self._shifts: PlacedShifts | None = None
        self._outputs: PlacedOutputs | None = None
        name = ", ".join(map(repr, self.edits[:3])) + (", ..." if len(self.edits) > 3 else "")
        self._placement = Placement.claim(model, "steering", self, name)
        try:
            # Tables made in inference mode could not be used outside of it.
            with torch.inference_mode(False):
                for_all = isinstance(edit, Steer)
                if not for_all or where != "all":
                    self._tell_rows(model, None if for_all else sets, where)
                self._placement.fill(self._place)
                self._place_outputs(model)
                self._place_shifts(model)
            self._placement.prove()
            self._check_missed()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the edits out of the model. Safe to repeat."""
        for rows in self._stacks.values():
            rows.remove()
        for hooked in (self._outputs, self._shifts):
            if hooked is not None:
                hooked.remove()
        if self._generation is not None:
            self._generation.remove()
        self._placement.release("steering", "edits", self)

    def _tell_rows(self, model: nn.Module, sets: list[int] | None, where: Where) -> None:
        """Let every stack find the edit set of each of its rows before it runs."""
        device = input_device(model)
        self._generation = Generation(model, device, None if sets is None else len(sets))
        found = stacks(self._placement.bare)
        for name, module in found.items():
            reads_only = name == "encoder" and len(found) > 1
            self._stacks[name] = StackSets(
                module, device, sets, where, self._generation, reads_only, self._placement
            )

    def _place(self, ffn: FFN, state: SiteState) -> None:
        state.edits = self._edits_of(ffn.site, device_of(ffn), state.columns)

    def _edits_of(
        self, site: Site, device: torch.device, columns: Columns | None = None
    ) -> SiteEdits | None:
        """The tables of one site, or None where nothing is edited."""
        tables = [
            edit.tables.get(site.name, _NOTHING) if isinstance(edit, Edit) else _NOTHING
            for edit in self.edits
        ]
        if not any(len(table[0]) for table in tables):
            return None
        width = site.width
        if columns is not None:
            # A process without edited neurons still takes its part in what the others run.
            tables, width = [columns.own(*table) for table in tables], columns.stop - columns.start
        # Numbered on from edit to edit; each has a set for every expert of a mixture.
        numbered = torch.cat(
            [table[0] + i * width * (site.experts or 1) for i, table in enumerate(tables)]
        )
        sets = len(tables) * (site.experts or 1)
        offsets = torch.searchsorted(numbered, torch.arange(sets + 1) * width)

        def on_device(values: Tensor, dtype: torch.dtype) -> Tensor:
            return values.to(device=device, dtype=dtype).contiguous()

        _, scale, shift = (torch.cat(parts) for parts in zip(*tables, strict=True))
        rows = self._stacks.get(site.stack)
        return SiteEdits(
            sets=rows_at(site, RowIndex() if rows is None else rows.index_on(device)),
            tables=ops.EditTables(
                on_device(offsets, torch.int32),
                on_device(numbered % max(width, 1), torch.int32),
                on_device(scale, torch.float32),
                on_device(shift, torch.float32),
                on_device(torch.zeros(2), torch.int64),
                width,
                chosen_backend(self._backend, device),
            ),
            exact=self._exact,
        )

    def _place_outputs(self, model: nn.Module) -> None:
        """Edits of sites that are no FFNs: linear layers' outputs."""
        ffns = self._placement.states.keys()
        edited = {
            site
            for edit in self.edits
            if isinstance(edit, Edit)
            for site in edit.tables
            if site not in ffns
        }
        if not edited:
            return
        layers = find_linears(model)
        names = stacks(self._placement.bare).keys()
        made = {
            site: self._edits_of(
                Site(site, out_features(layer), type(layer).__name__, stack_of(site, names)),
                next(layer.parameters()).device,
            )
            for site, layer in layers.items()
            if site in edited
        }
        self._outputs = PlacedOutputs(layers, made)

    def _place_shifts(self, model: nn.Module) -> None:
        shifts = [one if isinstance(one, Shift) else None for one in self.edits]
        if any(shifts):
            self._shifts = PlacedShifts(model, shifts, self._stacks.get("decoder"))

    def _check_missed(self) -> None:
        """What a forward pass does not meet is an error, where the probe could tell."""
        for hooked, what in (
            (self._outputs, "a linear layer that is to be edited"),
            (self._shifts, "a decoder layer that is to be shifted"),
        ):
            if hooked is not None and self._placement.last and hooked.missed:
                raise InputError(
                    f"{what} ({hooked.missed[0]}) did not run in a forward pass, so the steering "
                    "would do nothing there"
                )


_NOTHING = (torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0))


def _check_edits(edit: object) -> list[Steer | None]:
    given = [edit] if isinstance(edit, Steer) else edit
    known = isinstance(given, (list, tuple))
    wrong = [one for one in given if not isinstance(one, Steer | None)] if known else [given]
    if wrong:
        raise InputError(
            "steer takes one edit, made by deactivate, activate, scale or add, or a list with one "
            f"per sequence (None for none), got {type(wrong[0]).__name__}"
        )
    if all(one is None for one in given):
        raise InputError("steer was given no edit at all, so it would do nothing")
    return list(given)


def _position(edit: Steer, edits: list[Steer]) -> int:
    return next(index for index, one in enumerate(edits) if one is edit)

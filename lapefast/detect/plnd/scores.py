"""How much each neuron of a document matters: the scores that PLND selects by.

Zhao et al., NeurIPS 2024, arXiv 2402.18815. "paper": how much a block's output changes without the
neuron; "released": what the released code computes in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lapefast import ops
from lapefast.errors import InputError
from lapefast.models.attention import AttentionCall, Projections, projections_of, watching_attention
from lapefast.models.bare import bare_model, is_encoder_decoder
from lapefast.models.linears import find_linears
from lapefast.models.projections import up_projection
from lapefast.models.sites import Site
from lapefast.models.structure import FFN, find_ffns
from lapefast.models.taps import watching_products
from lapefast.profiling.documents import DocumentBatch
from lapefast.recording import Recorder
from lapefast.steering.linear import dense_weight

__all__ = ["KINDS", "DocumentScores", "Form", "Kind", "Unit", "ffn_scores"]

Kind = Literal["ffn", "query_key", "value"]
KINDS = get_args(Kind)
Form = Literal["paper", "released"]

Unit = tuple[Kind, str]
"""A kind and the path of the FFN or of the attention, whose units are counted from 0."""

_MAP_BYTES = 1 << 26  # of one attention's maps that are held at once


class DocumentScores:
    """Scores of documents, placed in a model.

    Args:
        model: the model.
        kinds: of ``ffn``, ``query_key``, ``value``.
        form: "paper" or "released".
        batch_size: the most documents in a forward pass.

    Attributes:
        projections: attention -> where its units come from; known once it has run.

    Raises:
        InputError: where the model's FFNs or attentions can't give these scores.
    """

    def __init__(
        self, model: nn.Module, kinds: Sequence[Kind], form: Form, batch_size: int
    ) -> None:
        self.projections: dict[str, Projections] = {}
        self._bare, self._form, self._kinds = bare_model(model), form, kinds
        self._found: dict[Unit, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._units: set[Unit] = set()
        self._lengths: list[int] = []
        self._placed = ExitStack()
        self._ffns = find_ffns(model) if "ffn" in kinds else []
        self._norms = {}
        if form == "paper":
            self._norms = {ffn.site.name: column_norms(ffn) for ffn in self._ffns}
        if set(kinds) & {"query_key", "value"} and is_encoder_decoder(self._bare):
            raise InputError(
                "query_key and value are scored in models of one stack; of an encoder-decoder take "
                'kinds=("ffn",)'
            )
        with self._placed:
            self._recorder = None
            self._statistic = "square_sums" if form == "paper" else "up_abs_sums"
            if form == "paper" and any(ffn.gated and not ffn.forward for ffn in self._ffns):
                # Their products can't be recorded, but looked at as they enter the projection.
                self._placed.enter_context(watching_products(model, self._see_product))
            elif form == "released" and not all(ffn.forward for ffn in self._ffns):
                for ffn in self._ffns:
                    up, first = up_projection(ffn)
                    see = functools.partial(self._see_up, ffn.site, first)
                    self._placed.callback(up.register_forward_hook(see).remove)
            elif "ffn" in kinds:
                slots = [str(slot) for slot in range(batch_size)]
                recorder = Recorder(model, slots, (self._statistic,))
                self._recorder = self._placed.enter_context(recorder)
            if len(kinds) > ("ffn" in kinds):
                for path, layer in find_linears(model).items():
                    keep = functools.partial(self._keep, path)
                    self._placed.callback(layer.register_forward_hook(keep).remove)
                self._placed.enter_context(watching_attention(model, self._see))
            self._placed = self._placed.pop_all()

    def __enter__(self) -> DocumentScores:
        return self

    def __exit__(self, *exception: object) -> None:
        self._placed.close()

    @torch.no_grad()
    def of(self, batch: DocumentBatch) -> dict[Unit, Tensor]:
        """Unit -> the scores of each document, float64 [documents, width], on the CPU.

        Raises:
            InputError: where the scores of some document are not finite.
        """
        self._found, self._batch, self._lengths = {}, batch, batch.lengths
        if self._recorder is not None:
            slots = torch.arange(len(batch.lengths), device=batch.mask.device)[:, None]
            groups = torch.where(batch.mask, slots, -1)
            stacked = is_encoder_decoder(self._bare)
            self._recorder.set(groups=groups, decoder_groups=groups if stacked else None)
        self._bare(**batch.inputs)
        scores = self._found
        if self._recorder is not None:
            scores |= self._recorded(len(batch.lengths))
        elif not scores:
            raise InputError(
                f"no self-attention of {type(self._bare).__name__} was seen: it does not go "
                "through transformers' attention functions; leave query_key and value out"
            )
        self._outputs.clear()
        missing = set(self._kinds) - {kind for kind, _ in scores}
        if self._units and scores.keys() != self._units:
            raise InputError(
                f"{type(self._bare).__name__} scored other neurons than of the documents before"
            )
        if missing:
            raise InputError(
                f"{type(self._bare).__name__} gave no scores of {', '.join(sorted(missing))}; "
                "leave these kinds out"
            )
        for (kind, path), found in scores.items():
            if not found.isfinite().all():
                raise InputError(f"{path}: scores of {kind} are not finite (NaN or infinite)")
        self._units = set(scores)
        return scores

    def _recorded(self, documents: int) -> dict[Unit, Tensor]:
        drained = self._recorder.drain()
        return {
            ("ffn", site): ffn_scores(found[self._statistic][:documents], self._norms.get(site))
            for site, found in drained.items()
        }

    def _see_product(self, ffn: FFN, product: Tensor) -> None:
        tokens = product.reshape(*self._batch.mask.shape, -1).float()
        squares = tokens.square().masked_fill(~self._batch.mask[..., None], 0)
        sums, site = squares.sum(1, dtype=torch.float64), ffn.site.name
        self._found["ffn", site] = ffn_scores(sums, self._norms[site])

    def _see_up(self, site: Site, first: int, module: nn.Module, given, output: Tensor) -> None:
        up = output.reshape(*self._batch.mask.shape, -1)[..., first : first + site.width]
        sums = up.float().abs().masked_fill(~self._batch.mask[..., None], 0)
        self._found["ffn", site.name] = ffn_scores(sums.sum(1, dtype=torch.float64), None)

    def _keep(self, path: str, module: nn.Module, given, output: Tensor) -> None:
        """What a projection gave, until it is known which units it makes."""
        if not self.projections or path.rpartition(".")[0] not in self.projections:
            self._outputs[path] = output

    def _see(self, call: AttentionCall) -> None:
        if call.path not in self.projections:
            self.projections[call.path] = projections_of(call, self._outputs)
        rows = range(len(self._lengths))
        if "query_key" in self._kinds:
            found = torch.stack([self._leave_one_out(call, row) for row in rows])
            self._found["query_key", call.path] = found
        if "value" in self._kinds:
            found = [call.output[row, : self._lengths[row]].double().abs().sum(0) for row in rows]
            self._found["value", call.path] = torch.stack(found).cpu()

    def _leave_one_out(self, call: AttentionCall, row: int) -> Tensor:
        """How the map of each head changes without each dimension, float64 [heads * dimensions]."""
        length, key_heads = self._lengths[row], call.key.shape[1]
        served = call.query.shape[1] // key_heads
        paper = self._form == "paper"
        # The released code takes the product away undivided.
        factor = call.scaling if paper else 1.0
        step = max(1, _MAP_BYTES // (4 * served * length * length))
        parts = []
        for start in range(0, key_heads, step):
            heads = slice(start, min(start + step, key_heads))
            some = slice(heads.start * served, heads.stop * served)
            changes = ops.leave_one_out(
                call.query[row, some, :length].float(),
                call.key[row, heads, :length].float(),
                call.scores(row, length, heads),
                factor,
                call.softcap,
            )
            parts.append(changes.sqrt() if paper else changes)
        return torch.cat(parts).flatten().cpu()


def ffn_scores(statistic: Tensor, norms: Tensor | None) -> Tensor:
    """Scores of an FFN's neurons, float64 [documents, width], on the CPU.

    Args:
        statistic: [documents, width]: with ``norms``, the sums of squared products (a profile's
            ``square_sums``); without, the released form's sums of |up|.
        norms: of the last projection's columns, float64 [width].
    """
    statistic = statistic.double().cpu()
    return statistic if norms is None else norms * statistic.sqrt()


def column_norms(ffn: FFN) -> Tensor:
    """The Euclidean norm of each column of an FFN's last projection, float64 [width]."""
    return torch.linalg.vector_norm(
        dense_weight(ffn.last, ffn.site.name), dim=0, dtype=torch.float64
    ).cpu()

"""Which experts each token uses, counted while a model runs (arXiv 2402.16367)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lapefast.detect.experts.result import check_share
from lapefast.errors import InputError
from lapefast.models.bare import bare_model, stacks
from lapefast.models.groups import token_groups
from lapefast.models.structure import FFN
from lapefast.models.taps import watching_products
from lapefast.models.traces import PLACEMENT

__all__ = ["ExpertUse", "Form", "check_choice"]

Form = Literal["identity", "absolute", "positive"]

_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda product: product,
    "absolute": torch.abs,
    "positive": torch.relu,
}


class ExpertUse:
    """A context manager that counts, within it, which experts the tokens of each label choose.

    Per token and layer, an expert's score is the sum over its neurons of f(product), in float32.
    A layer's scores are z-scored, over its experts, by mean and population standard deviation (a
    constant row gives zeros), so that layers compare. Of all (layer, expert) pairs of a token's
    stack, the round(share * layers * experts) with the highest scores are chosen, at least one;
    ties go to the lower layer, then to the lower expert.

    A recorder or a steering may be placed in the model as well; what is edited is scored edited.
    Memory: float32 [tokens, layers, experts] for the tokens of one forward pass.

    Args:
        model: any whose FFNs `lapefast.models.find_sites` finds, each run once in a forward pass.
        labels: what the tokens are grouped by; distinct.
        clusters: site -> int64 [width], the expert of each neuron, for every site; see
            `lapefast.detect.experts.splitting.split_ffns`.
        share: of all pairs, how many a token chooses; over 0 and at most 1. The paper, as far as
            we have read it, gives none.
        form: f: "identity", "absolute" value or "positive" part.

    Attributes:
        chosen: int64 [labels, layers, experts], tokens that chose the expert.
        tokens: int64 [labels, layers], tokens that passed the layer.

    Raises:
        InputError: the clusters do not fit the model, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Sequence[str],
        clusters: Mapping[str, Tensor],
        share: float = 0.1,
        form: Form = "identity",
    ) -> None:
        check_choice(share, form)
        if isinstance(labels, str) or not labels or len(set(labels)) < len(labels):
            raise InputError(f"labels must be a list of distinct names, got {labels!r}")
        counts = {site: int(experts.max()) + 1 for site, experts in clusters.items()}
        if len(set(counts.values())) != 1:
            raise InputError(f"all layers need the same number of experts, got {counts}")
        self.labels = list(labels)
        self._share, self._function, self._model = share, _FORMS[form], model
        self._experts = next(iter(counts.values()))
        self._members = {site: _Members(site, clusters[site], self._experts) for site in clusters}
        self._layer = {site: layer for layer, site in enumerate(clusters)}
        shape = len(self.labels), len(self._layer)
        self.chosen = torch.zeros(*shape, self._experts, dtype=torch.int64)
        self.tokens = torch.zeros(shape, dtype=torch.int64)
        self._stacks: dict[str, _Stack] = {}
        self._placed = ExitStack()

    def __enter__(self) -> ExpertUse:
        with ExitStack() as placed:
            ffns = placed.enter_context(watching_products(self._model, self._score))
            found = {ffn.site.name: ffn.site.width for ffn in ffns}
            given = {site: members.width for site, members in self._members.items()}
            if found != given:
                raise InputError(
                    f"the experts are of the sites and widths {given}, but the model has {found}; "
                    "split this model's FFNs"
                )
            for name, module in stacks(bare_model(self._model)).items():
                sites = [ffn.site.name for ffn in ffns if ffn.site.stack == name]
                stack = self._stacks[name] = _Stack(sites)
                for hook in (
                    module.register_forward_pre_hook(lambda *_, stack=stack: self._start(stack)),
                    module.register_forward_hook(lambda *_, stack=stack: self._choose(stack)),
                ):
                    placed.callback(hook.remove)
            self._placed = placed.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._placed.close()
        self._stacks = {}

    def set(
        self,
        label: str | None = None,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        decoder_groups: Tensor | None = None,
    ) -> None:
        """Say what the next forward passes' tokens are, as to `lapefast.recording.Recorder.set`."""
        given = label, mask, groups, decoder_mask, decoder_groups
        for name, index in token_groups(self.labels, self._stacks, *given).items():
            self._stacks[name].groups = index.reshape(-1).long()

    def frequency(self) -> Tensor:
        """float64 [labels, layers, experts]: tokens that chose the expert / tokens.

        Raises:
            InputError: a label has no tokens.
        """
        if not self.tokens.all():
            label = self.labels[int((self.tokens == 0).nonzero()[0, 0])]
            raise InputError(f"no token of label {label!r} was seen; give some text of it")
        return self.chosen.double() / self.tokens[:, :, None]

    @property
    def _probing(self) -> bool:
        """Whether a recorder or a steering proves itself on tokens of no text."""
        return getattr(bare_model(self._model).__dict__.get(PLACEMENT), "probing", False)

    def _start(self, stack: _Stack) -> None:
        if stack.groups is None and not self._probing:
            raise InputError("the tokens are not known: call set(...) before the model")
        stack.ran.clear()

    @torch.no_grad()
    def _score(self, ffn: FFN, product: Tensor) -> None:
        """Keep the z-scored scores of one layer."""
        if self._probing:
            return
        site, stack = ffn.site.name, self._stacks[ffn.site.stack]
        if site in stack.ran:
            raise InputError(
                f"{site} runs more than once in a forward pass, so its experts stand for several "
                "layers; experts are counted for FFNs that run once"
            )
        stack.ran.add(site)
        scores = self._members[site].sums(self._function, product.flatten(0, -2))
        shape = len(scores), len(stack.sites), self._experts
        if stack.scores is None or stack.scores.shape != shape:
            with torch.inference_mode(False):  # or it could not be written to outside of it
                stack.scores = torch.empty(shape, device=scores.device)
        stack.scores[:, stack.sites.index(site)] = _standardised(scores)

    @torch.no_grad()
    def _choose(self, stack: _Stack) -> None:
        """Count the pairs that each token of the forward pass chooses."""
        if self._probing:
            return
        for site in stack.sites:
            if site not in stack.ran:
                raise InputError(
                    f"{site} computed no product in a forward pass, so a token's experts can't be "
                    "chosen among all layers"
                )
        scores, groups = stack.scores.flatten(1), stack.groups
        if len(groups) not in (1, len(scores)):
            raise InputError(
                f"the model's input is {len(scores)} tokens, but set was given {len(groups)}; "
                "call it before each forward pass"
            )
        groups = groups.to(scores.device).expand(len(scores))
        if not (counted := groups >= 0).all():
            scores, groups = scores[counted], groups[counted]
        # A z-score is at most sqrt(experts), so that only what is not finite makes the sum so.
        if not scores.sum().isfinite():
            finite = scores.unflatten(1, (len(stack.sites), -1)).isfinite().all(2).all(0)
            raise InputError(
                f"{stack.sites[int((~finite).nonzero()[0])]}: products are not finite (NaN or "
                "infinite), or too large or small to score; check the model's weights or use a "
                "wider dtype"
            )
        chosen = _highest(scores, max(1, round(self._share * scores.shape[1])))
        layers = torch.tensor([self._layer[site] for site in stack.sites])
        for index in groups.unique().tolist():
            of_label = chosen[groups == index]
            self.tokens[index, layers] += len(of_label)
            counts = of_label.sum(0, dtype=torch.int32).view(len(layers), -1)
            self.chosen[index, layers] += counts.cpu()


@dataclass
class _Stack:
    """The layers that the tokens of one input pass, and what is held of a forward pass.

    Attributes:
        sites: in model order.
        groups: the label's index of each token, int64 [batch * length], or of all, [1].
        ran: the sites that ran in this forward pass.
        scores: float32 [batch * length, sites, experts], z-scored per layer.
    """

    sites: list[str]
    groups: Tensor | None = None
    ran: set[str] = field(default_factory=set)
    scores: Tensor | None = None


def check_choice(share: float, form: str) -> None:
    """Raises InputError, where tokens can't choose by these."""
    if form not in _FORMS:
        raise InputError(f"form must be one of {', '.join(_FORMS)}, got {form!r}")
    check_share(share, "share")


class _Members:
    """The neurons of one layer's experts, in an order in which their sums are quick.

    Columns are taken in turns, one of every expert, so that the sum runs over whole rows of
    experts. Multiplying by a [width, experts] matrix of zeros and ones takes longer, and on a GPU
    float32 factors may be shortened.
    """

    def __init__(self, site: str, experts: Tensor, count: int) -> None:
        self.width = len(experts)
        sizes = experts.bincount(minlength=count)
        self._turns = self.width // count
        if sizes.min() < self._turns or sizes.max() > self._turns + 1:
            raise InputError(
                f"{site}: experts must have floor or ceil of {self.width} / {count} neurons, got "
                f"{int(sizes.min())} to {int(sizes.max())}"
            )
        by_expert = experts.argsort(stable=True)
        turn = torch.arange(self.width) - (sizes.cumsum(0) - sizes)[experts[by_expert]]
        self._columns = by_expert[turn.argsort(stable=True)]
        self._larger = (sizes > self._turns).nonzero().squeeze(1)

    def sums(self, function: Callable[[Tensor], Tensor], product: Tensor) -> Tensor:
        """The sum of f over each expert's neurons, float32 [tokens, experts]."""
        self._columns = self._columns.to(product.device)
        values = function(product.index_select(1, self._columns))
        whole = self._columns.numel() - self._larger.numel()
        turns = values[:, :whole].unflatten(1, (self._turns, -1))
        sums = turns.sum(1, dtype=torch.float32)
        if len(self._larger):
            sums.index_add_(1, self._larger.to(sums.device), values[:, whole:].float())
        return sums


def _standardised(scores: Tensor) -> Tensor:
    """z-scores within each row; a constant row gives zeros."""
    # Not by the spread, which would be 0 / 0 or, where the mean is off by a rounding, anything.
    constant = scores.amax(1, keepdim=True) == scores.amin(1, keepdim=True)
    # The same arithmetic, in one step that is several times faster than by mean and deviation.
    normed = nn.functional.layer_norm(scores, scores.shape[1:], eps=0.0)
    return normed.masked_fill_(constant, 0.0)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Whether each score is among its row's ``count`` highest, ties by index; bool, its shape."""
    least = _kth_highest(scores, count)
    chosen = scores >= least
    tied = (chosen.sum(1, dtype=torch.int32) > count).nonzero().squeeze(1)
    if len(tied):
        above, ties = scores[tied] > least[tied], scores[tied] == least[tied]
        places = count - above.sum(1, keepdim=True)
        chosen[tied] = above | (ties & (ties.cumsum(1) <= places))
    return chosen


def _kth_highest(scores: Tensor, count: int) -> Tensor:
    """[rows, 1]. On a CPU numpy's partition is several times faster than torch's topk."""
    if scores.device.type != "cpu":
        return scores.topk(count, dim=1).values[:, -1:]
    place = scores.shape[1] - count
    return torch.from_numpy(np.partition(scores.numpy(), place, axis=1)[:, place : place + 1])

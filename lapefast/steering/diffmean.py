"""DiffMean: mean hidden states of each label's text, and shifts of the residual stream from them.

A baseline of steering by neurons: what the target's text has on average in the residual stream,
less what the other labels' texts have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lapefast import __version__
from lapefast.errors import InputError
from lapefast.models import fingerprint
from lapefast.models.bare import bare_model, evaluating, headless
from lapefast.profiling.batches import CorpusPass
from lapefast.sealed import SealedFile
from lapefast.steering.shifts import Shift, decoder_layers

__all__ = ["ResidualMeans", "residual_means"]

_FILE = SealedFile("residual means file", "1", "residual_means", "`lapefast.ResidualMeans.save`")


class ResidualMeans:
    """Per label and decoder layer, the mean over all tokens of the hidden state leaving the layer.

    Args:
        labels: what the texts are grouped by; distinct.
        layers: names of the decoder's layers inside the bare model, such as ``layers.0``, in model
            order.
        means: float64 [labels, layers, hidden].
        tokens: int64 [labels], over how many tokens each mean was taken.
        fingerprint: of the model, if known.
        metadata: how they were found: model, dtype, corpora and so on, as JSON.

    Attributes:
        means: label -> float64 [layers, hidden].

    Raises:
        InputError: shapes, dtypes or names are not as said, or a mean is not finite.
    """

    def __init__(
        self,
        labels: Sequence[str],
        layers: Sequence[str],
        means: Tensor,
        tokens: Tensor,
        fingerprint: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        for what, names in (("labels", labels), ("layers", layers)):
            texts = all(isinstance(name, str) and name for name in names)
            if not names or not texts or len(set(names)) < len(names):
                raise InputError(f"residual means need distinct names as {what}, got {names}")
        if means.dtype != torch.float64 or means.shape[:-1] != (len(labels), len(layers)):
            raise InputError(
                f"means must be float64 [labels, layers, hidden] = [{len(labels)}, {len(layers)}, "
                f"hidden], got {means.dtype} {list(means.shape)}"
            )
        if tokens.dtype != torch.int64 or tokens.shape != (len(labels),) or (tokens < 1).any():
            raise InputError(
                f"tokens must be int64 [labels] = [{len(labels)}] of at least 1, got "
                f"{tokens.dtype} {list(tokens.shape)}"
            )
        for label, of_label in zip(labels, means, strict=True):
            for layer, mean in zip(layers, of_label, strict=True):
                if not mean.isfinite().all():
                    raise InputError(
                        f"the mean hidden state of label {label!r} leaving layer {layer} is not "
                        "finite (NaN or infinite); check the model's weights or use a wider dtype"
                    )
        self.labels, self.layers = list(labels), list(layers)
        self.means = dict(zip(self.labels, means, strict=True))
        self.tokens = tokens
        self.fingerprint = fingerprint
        self.metadata = dict(metadata or {})

    def towards(
        self,
        label: str,
        layers: Sequence[int | str] | None = None,
        strength: float = 1.0,
    ) -> Shift:
        """The shift ``h <- h + strength * v`` that moves the hidden state towards a label.

        At a layer, ``v`` is the label's mean less the mean of the other labels' means, every label
        counting the same however long its text is; it is not normalised.

        Args:
            label: the target.
            layers: by index (from the end, if negative) or name. None takes the middle one alone:
                a layer's ``v`` already holds what the layers before it carry through the residual
                stream, so that strength 1 at every layer would add much of the same difference
                again and again.
            strength: factor of ``v``.

        Raises:
            InputError: there is no other label, or no such label or layer, or the result is not
                finite in float32.
        """
        if label not in self.means:
            raise InputError(
                f"there are no residual means of label {label!r}; there are some of "
                f"{', '.join(self.labels)}"
            )
        if len(self.labels) < 2:
            raise InputError(
                f"a shift towards {label!r} is a difference from other labels, so residual means "
                "need at least two labels, got one"
            )
        chosen = [len(self.layers) // 2] if layers is None else list(map(self._index, layers))
        others = [mean for other, mean in self.means.items() if other != label]
        vectors = strength * (self.means[label] - torch.stack(others).mean(0))
        return Shift({self.layers[i]: vectors[i].float() for i in chosen}, self.fingerprint)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; the same means give the same bytes.

        Raises:
            InputError: the file cannot be written; then nothing is.
        """
        about = {
            "labels": self.labels,
            "layers": self.layers,
            "fingerprint": self.fingerprint,
            "metadata": self.metadata,
        }
        tensors = {"tokens": self.tokens, "means": torch.stack([*self.means.values()])}
        _FILE.write(path, tensors, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ResidualMeans:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, cut short, damaged, of another kind or of another
                format version.
        """
        try:
            return cls(*_FILE.read(path, _arguments))
        except InputError as error:
            raise InputError(f"cannot load {path}: {error}") from error

    def _index(self, layer: int | str) -> int:
        count = len(self.layers)
        if isinstance(layer, str) and layer in self.layers:
            return self.layers.index(layer)
        if type(layer) is int and -count <= layer < count:
            return layer % count
        raise InputError(
            f"there is no layer {layer!r} among the {count} of these residual means, "
            f"{self.layers[0]} to {self.layers[-1]}; name one or give its index"
        )

    def __repr__(self) -> str:
        return f"ResidualMeans({', '.join(self.labels)} at {len(self.layers)} layers)"


def residual_means(
    model: nn.Module,
    corpora: Mapping[str, Any],
    tokenizer: Any = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    *,
    document: str = "line",
    field: str = "text",
    special_tokens: bool = True,
) -> ResidualMeans:
    """The mean hidden state that leaves each decoder layer, for each label's text.

    One pass of the bare model, as `lapefast.profile` makes it, with its arguments. Sums are taken
    in float64. Of an encoder-decoder, the decoder's layers are read.

    Raises:
        InputError: for what is wrong with the model, the corpora or the arguments, and for hidden
            states that are not finite.
    """
    layers = decoder_layers(model)
    text = CorpusPass(
        model,
        corpora,
        tokenizer,
        seq_len,
        batch_size,
        max_tokens,
        progress,
        document=document,
        field=field,
        special_tokens=special_tokens,
    )
    bare = bare_model(model)
    means, tokens = [], []
    with evaluating(model), headless(bare), _summing(layers) as sums, torch.no_grad():
        for label in text.labels:
            sums.clear()
            for inputs in text.inputs(label):
                bare(**inputs)
            for name in layers:
                if name not in sums:
                    raise InputError(f"decoder layer {name} did not run in a forward pass")
            means.append(torch.stack([sums[name][0].cpu() / sums[name][1] for name in layers]))
            tokens.append(sums[next(iter(layers))][1])
    dtype = next(iter(layers.values())).parameters()
    return ResidualMeans(
        text.labels,
        list(layers),
        torch.stack(means),
        torch.tensor(tokens),
        fingerprint(model),
        {
            "model": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
            "dtype": str(next(dtype).dtype).removeprefix("torch."),
            "tokenizer": getattr(tokenizer, "name_or_path", None),
            **text.metadata(),
            "threads": torch.get_num_threads(),
            "lapefast": __version__,
            "torch": torch.__version__,
        },
    )


@contextmanager
def _summing(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Within it, layer -> the sum of what left it, float64 [hidden], and of how many tokens."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def hook_of(name: str):
        def add(module: nn.Module, given: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            rows = hidden.flatten(0, -2)
            before, count = sums.get(name, (0.0, 0))
            sums[name] = before + rows.sum(0, dtype=torch.float64), count + len(rows)

        return add

    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _arguments(about: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    names = list(about["labels"]), list(about["layers"])
    values = tensors.pop("means"), tensors.pop("tokens")
    return *names, *values, about["fingerprint"], dict(about["metadata"])

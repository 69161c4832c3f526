"""A site: a named place of neurons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One FFN of a model.

    Attributes:
        name: path inside the bare decoder or encoder-decoder, wrappers stripped.
        width: number of neurons.
        activation: class name of the activation module, such as ``SiLUActivation``.
        stack: ``"decoder"`` or ``"encoder"``: whose tokens pass here.
        calls: times it fires in one forward pass; more than 1 where layers share one FFN.
    """

    name: str
    width: int
    activation: str
    stack: str = "decoder"
    calls: int = 1

"""A site: a named place of neurons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One FFN of a model, or one mixture of experts.

    Attributes:
        name: path inside the bare decoder or encoder-decoder, wrappers stripped; a mixture's is
            that of the module which holds its experts.
        width: number of neurons, in a mixture of each expert.
        activation: class name of the activation module, such as ``SiLUActivation``; of experts that
            have none, their own class name.
        stack: ``"decoder"`` or ``"encoder"``: whose tokens pass here.
        calls: times it fires in one forward pass; more than 1 where layers share one FFN.
        experts: how many a mixture has; 0 for a dense FFN.
    """

    name: str
    width: int
    activation: str
    stack: str = "decoder"
    calls: int = 1
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one value per neuron: (width,), or (experts, width) in a mixture."""
        return (self.experts, self.width) if self.experts else (self.width,)

    @property
    def neurons(self) -> int:
        """How many neurons there are; a mixture's have the flat index expert * width + neuron."""
        return self.width * (self.experts or 1)

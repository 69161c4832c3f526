"""The options of each method of `lapefast identify`, and how it is run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lapefast.cli import options
from lapefast.cli.options import LOADING, TEXT
from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.neurons import NeuronSets

__all__ = [
    "DOCUMENTS",
    "METHODS",
    "AveragePrecisionOptions",
    "ExpertOptions",
    "LapeOptions",
    "Material",
    "PlndOptions",
    "SharingOptions",
    "check_sharing",
    "refuse_others",
]

Form = Literal["paper", "released"]
DOCUMENTS = 1000  # that are read of each label, unless said otherwise


@dataclass(frozen=True)
class LapeOptions:
    """Of LAPE."""

    top_rate: Annotated[
        float,
        typer.Option(
            help="Share of all neurons that remain: those of least entropy.",
            rich_help_panel="LAPE",
        ),
    ] = 0.01
    filter_rate: Annotated[
        float,
        typer.Option(
            help="Share of all probabilities too small to keep a neuron.", rich_help_panel="LAPE"
        ),
    ] = 0.95
    activation_bar_ratio: Annotated[
        float,
        typer.Option(
            help="Share of all probabilities too small to belong to a label.",
            rich_help_panel="LAPE",
        ),
    ] = 0.95
    over: Annotated[
        Literal["routed", "all"],
        typer.Option(
            help="Of a mixture of experts: probabilities over the tokens routed to the expert, or "
            "over all.",
            rich_help_panel="LAPE",
        ),
    ] = "routed"


@dataclass(frozen=True)
class PlndOptions:
    """Of PLND."""

    kinds: Annotated[
        str,
        typer.Option(help="Comma-separated, of ffn, query_key and value.", rich_help_panel="PLND"),
    ] = "ffn,query_key,value"
    top_ffn: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Neurons of an FFN per document and layer; by default the released code's.",
            rich_help_panel="PLND",
        ),
    ] = None
    top_attention: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Units of an attention per document and layer; by default the released code's.",
            rich_help_panel="PLND",
        ),
    ] = None
    score_threshold: Annotated[
        float | None,
        typer.Option(
            help="Instead of so many, those whose score is above it.", rich_help_panel="PLND"
        ),
    ] = None


@dataclass(frozen=True)
class AveragePrecisionOptions:
    """Of average precision."""

    top: Annotated[
        int,
        typer.Option(
            min=0, help="Units of highest score per label.", rich_help_panel="Average precision"
        ),
    ] = 1000
    bottom: Annotated[
        int,
        typer.Option(
            min=0, help="Units of lowest score per label.", rich_help_panel="Average precision"
        ),
    ] = 1000


@dataclass(frozen=True)
class SharingOptions:
    """Of sharing."""

    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Parallel examples: JSON lines of a prompt by label, or of prompt and answer.",
            show_default=False,
            rich_help_panel="Sharing",
        ),
    ] = None
    threshold: Annotated[
        float,
        typer.Option(
            help="A neuron is active where its activation is above it.", rich_help_panel="Sharing"
        ),
    ] = 0.0
    values: Annotated[
        Literal["activation", "product"],
        typer.Option(
            metavar="VALUES",
            help="What the threshold is for: activation or product.",
            rich_help_panel="Sharing",
        ),
    ] = "activation"


@dataclass(frozen=True)
class ExpertOptions:
    """Of experts."""

    experts: Annotated[
        int, typer.Option(min=1, help="Experts per layer.", rich_help_panel="Experts")
    ] = 256
    share: Annotated[
        float,
        typer.Option(help="Of all experts, how many a token chooses.", rich_help_panel="Experts"),
    ] = 0.1
    high: Annotated[
        float | None,
        typer.Option(
            help="Of all experts, how many a label's neurons are taken from, its most frequent "
            "first; by default as many as a token chooses.",
            show_default=False,
            rich_help_panel="Experts",
        ),
    ] = None
    only: Annotated[
        bool,
        typer.Option(
            "--only",
            help="Leave out experts that are another label's, too.",
            rich_help_panel="Experts",
        ),
    ] = False


@dataclass(frozen=True)
class Material:
    """What a method works on, as the command was given it."""

    source: str
    corpora: dict[str, str] | None
    form: Form
    text: options.TextOptions
    loading: options.ModelOptions
    batch_size: int | None
    seq_len: int | None
    max_documents: int | None

    def load(self, needs_corpora: bool = True) -> options.Loaded:
        """The model, for a method that runs one; all else has been checked."""
        corpora = self.corpora if needs_corpora else None
        return self.loading.load(self.source, corpora, self.text)

    def check(self, method: str, forms: bool = False) -> None:
        """For a method that runs a model on texts of each label."""
        if self.corpora is None:
            raise InputError(f"{method} reads texts of each label; give them by --corpus")
        if self.form != "paper" and not forms:
            raise InputError(f"{method} has one form, the paper's; leave --form out")
        self.check_model(method)

    def check_model(self, method: str) -> None:
        """For a method that runs a model."""
        if Path(self.source).is_file():
            raise InputError(
                f"{method} runs a model, but {self.source} is a file; give the model's directory "
                "or its name on the hub"
            )

    def refuse_reading(self, method: str, what: str) -> None:
        """For a method that reads no corpus: nothing of how one is read may have been asked for."""
        asked = (self.corpora, self.seq_len, self.max_documents, self.text)
        if asked != (None, None, DOCUMENTS, TEXT):
            raise InputError(
                f"{method} reads {what}; leave --corpus and the options of texts and of the run "
                "out, or choose another --method"
            )

    def refuse_model(self, method: str) -> None:
        """For a method that runs no model."""
        if self.batch_size is not None or self.loading != LOADING:
            raise InputError(f"{method} loads no model; leave the options of models out")

    def reading(self) -> dict[str, Any]:
        """How documents are read."""
        return {
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "max_documents": self.max_documents,
            **asdict(self.text),
        }


Found = tuple["NeuronSets", Any]
"""The neurons, and the method's whole result where that is more than them."""


def lape(material: Material, chosen: LapeOptions) -> Found:
    material.refuse_reading("LAPE", "a profile and no text")
    material.refuse_model("LAPE")
    from lapefast import Profile
    from lapefast.detect import lape as run

    if Path(material.source).is_dir():
        raise InputError(
            f"LAPE reads a profile, but {material.source} is a directory; make a profile of the "
            "model with `lapefast profile` first, or choose another --method"
        )
    profile = Profile.load(material.source)
    return run(profile, **asdict(chosen), form=material.form), None


def plnd(material: Material, chosen: PlndOptions) -> Found:
    from lapefast.detect import plnd as run
    from lapefast.detect.plnd.detector import check_request

    material.check("PLND", forms=True)
    kinds = tuple(kind.strip() for kind in chosen.kinds.split(","))
    tops = {kind: chosen.top_ffn if kind == "ffn" else chosen.top_attention for kind in kinds}
    if None in tops.values():
        if set(tops.values()) != {None}:
            raise InputError("give both --top-ffn and --top-attention, or neither")
        tops = None
    check_request(material.corpora, kinds, material.form, tops, chosen.score_threshold)
    loaded = material.load()
    found = run(
        loaded.model,
        loaded.tokenizer,
        material.corpora,
        kinds=kinds,
        form=material.form,
        top=tops,
        threshold=chosen.score_threshold,
        **material.reading(),
    )
    return found, None


def average_precision(material: Material, chosen: AveragePrecisionOptions) -> Found:
    from lapefast.detect import average_precision as run
    from lapefast.detect.average_precision.detector import check_request

    material.check("average precision")
    check_request(material.corpora, **asdict(chosen))
    loaded = material.load()
    found = run(
        loaded.model,
        loaded.tokenizer,
        material.corpora,
        **asdict(chosen),
        **material.reading(),
    )
    return found, found


def sharing(material: Material, chosen: SharingOptions) -> Found:
    from lapefast.detect import sharing as run

    material.refuse_reading("sharing", "--examples")
    material.check_model("sharing")
    check_sharing(chosen)
    loaded = material.load(needs_corpora=False)
    found = run(
        loaded.model,
        loaded.tokenizer,
        chosen.examples,
        chosen.threshold,
        values=chosen.values,
        form=material.form,
        batch_size=material.batch_size,
    )
    return found.neurons, found


def experts(material: Material, chosen: ExpertOptions) -> Found:
    from lapefast.detect import experts as run
    from lapefast.detect.experts.result import check_share

    material.check("experts")
    check_share(chosen.share, "share")
    if chosen.high is not None:
        check_share(chosen.high, "high")
    loaded = material.load()
    found = run(
        loaded.model,
        material.corpora,
        loaded.tokenizer,
        chosen.experts,
        chosen.share,
        seed=material.loading.seed,
        **material.reading(),
    )
    return found.neuron_sets(top=chosen.high, only=chosen.only), found


def check_sharing(chosen: SharingOptions) -> None:
    """Raises InputError for what is wrong with the options whatever the model is."""
    from lapefast.detect.sharing.examples import parallel_texts

    if chosen.examples is None:
        raise InputError("sharing compares prompts of one meaning; give them by --examples")
    if not math.isfinite(chosen.threshold):
        raise InputError(f"--threshold must be a finite number, got {chosen.threshold}")
    parallel_texts(chosen.examples)


def refuse_others(method: str, given: Mapping[str, Any]) -> None:
    """No option of another method may have been asked for; `given`: method -> its options."""
    for other, chosen in given.items():
        for field in fields(chosen):
            if other != method and getattr(chosen, field.name) != field.default:
                option = field.name.replace("_", "-")
                raise InputError(f"--{option} is an option of {other}, not of {method}")


METHODS = {
    "lape": lape,
    "plnd": plnd,
    "average-precision": average_precision,
    "sharing": sharing,
    "experts": experts,
}

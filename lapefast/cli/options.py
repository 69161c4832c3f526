"""Options that commands share, and what is done with them."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from lapefast.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from lapefast.engines.transformers import Checkpoint

_MODEL_PANEL = "Model"
RUN_PANEL = "Run"
_TEXT_PANEL = "Text"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory of a saved model, or a name on the hub.")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.", show_default=False)
]
Corpora = Annotated[
    list[str],
    typer.Option(
        "--corpus",
        metavar="LABEL=SOURCE",
        help="Text of a label: a file, a directory, a quoted glob, or a data set "
        "(name:config:split). Once per label.",
        show_default=False,
        rich_help_panel=_TEXT_PANEL,
    ),
]
Document = Annotated[
    Literal["line", "file", "blank-line"],
    typer.Option(
        metavar="UNIT",
        help="What one document of a text file is: line, file or blank-line.",
        rich_help_panel=_TEXT_PANEL,
    ),
]
Field = Annotated[
    str,
    typer.Option(help="Field of JSON lines, Parquet and data sets.", rich_help_panel=_TEXT_PANEL),
]
SpecialTokens = Annotated[
    bool,
    typer.Option(
        " /--no-special-tokens",
        help="The tokenizer adds its special tokens to no document.",
        show_default=False,
        rich_help_panel=_TEXT_PANEL,
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    typer.Option(
        help="Of the weights; auto is the checkpoint's.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Such as cpu or cuda:1; by default the GPU, if there is one.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="auto spreads the model over devices; or JSON, module to device, cpu or disk.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL_PANEL),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
Quantization = Annotated[
    Literal["4bit", "8bit"] | None,
    typer.Option(
        help="Quantise the weights by bitsandbytes.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
TensorParallel = Annotated[
    bool,
    typer.Option(
        "--tensor-parallel",
        help="Split each layer over the processes that torchrun started.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Rows per forward pass; by default as many as are fast and fit the memory.",
        rich_help_panel=RUN_PANEL,
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens per row; by default the model's limit, at most 2048.",
        rich_help_panel=RUN_PANEL,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens to read per label.", rich_help_panel=RUN_PANEL),
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Of random numbers.", rich_help_panel=RUN_PANEL),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=4096, help="CPU threads; by default torch's.", rich_help_panel=RUN_PANEL
    ),
]
Engine = Annotated[
    Literal["transformers", "vllm"],
    typer.Option(
        metavar="NAME",
        help="Who runs the model: transformers or vllm.",
        rich_help_panel=RUN_PANEL,
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(min=1, help="Workers of vLLM that share each layer.", rich_help_panel=RUN_PANEL),
]
WhereEdited = Annotated[
    Literal["all", "prompt", "generated"],
    typer.Option(
        metavar="POSITIONS",
        help="Where edits hold: all, prompt or generated.",
        rich_help_panel=RUN_PANEL,
    ),
]
NewTokens = Annotated[
    int, typer.Option(min=1, help="Most tokens per prompt.", rich_help_panel=RUN_PANEL)
]
Languages = Annotated[
    list[str] | None,
    typer.Option(
        "--language",
        metavar="LABEL=CODE",
        help="The language of a label that is not its code. May be repeated.",
        show_default=False,
    ),
]
AnyLanguage = Annotated[
    bool,
    typer.Option(
        "--any-language",
        help="Texts may be in any language, not the labels' alone: short ones are then often "
        "taken for a relative.",
    ),
]
GenerationBatch = Annotated[
    int,
    typer.Option("--batch-size", min=1, help="Prompts per batch.", rich_help_panel=RUN_PANEL),
]


@dataclass(frozen=True)
class TextOptions:
    """How text is read, as every command that reads some takes it."""

    document: Document = "line"
    field: Field = "text"
    special_tokens: SpecialTokens = True


TEXT = TextOptions()


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded, as every command that runs one takes it."""

    dtype: Dtype = "auto"
    device: Device = None
    device_map: DeviceMap = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    quantization: Quantization = None
    seed: Seed = 0
    threads: Threads = None

    def load(
        self,
        name: str,
        corpora: dict[str, str] | None,
        text: TextOptions = TEXT,
        tokenizer: bool | None = None,
        tensor_parallel: bool = False,
    ) -> Loaded:
        """Load the model of a command, after setting threads and random numbers.

        The tokenizer is that of `load_tokenizer`. The corpora are looked at before the model, which
        may take long to load.
        """
        import torch

        from lapefast.engines.transformers import load_model

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        loaded = self.load_tokenizer(name, corpora, text, tokenizer)
        placing = (self.device, self.device_map, self.quantization, tensor_parallel)
        return Loaded(load_model(self._checkpoint(name), self.dtype, *placing), loaded)

    def load_tokenizer(
        self,
        name: str,
        corpora: dict[str, str] | None,
        text: TextOptions = TEXT,
        wanted: bool | None = None,
    ) -> Any:
        """The model's tokenizer, or None, after a look at the corpora.

        Loaded as `wanted` says; None: unless every corpus is a file of token ids.
        """
        from transformers.utils import logging as transformers_logging

        from lapefast.corpus import open_corpora
        from lapefast.engines.transformers import load_tokenizer

        transformers_logging.set_verbosity_error()
        if wanted is None:
            ids = (".npy", ".pt", ".pth")
            wanted = not corpora or any(Path(one).suffix not in ids for one in corpora.values())
        loaded = load_tokenizer(self._checkpoint(name)) if wanted else None
        if corpora is not None:
            open_corpora(corpora, loaded, **asdict(text))
        return loaded

    def _checkpoint(self, name: str) -> Checkpoint:
        from lapefast.engines.transformers import Checkpoint

        return Checkpoint(name, self.revision, self.trust_remote_code)


LOADING = ModelOptions()


@dataclass(frozen=True)
class Loaded:
    """A model ready to run (for vLLM its name), and the tokenizer that text needs."""

    model: nn.Module | str
    tokenizer: Any


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every field of a parameter that is such a dataclass as an option.

    It refuses to write over a file that it is to read.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            options = [(name, hints[name], parameter.default)]
        else:
            groups[name] = hints[name]
            inner = get_type_hints(hints[name], include_extras=True)
            options = [(one.name, inner[one.name], one.default) for one in fields(hints[name])]
        parameters += [
            inspect.Parameter(
                option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
            )
            for option, hint, default in options
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        _check_read_files(given)
        made = {
            name: group(**{one.name: given.pop(one.name) for one in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


_WRITTEN = ("output", "details")
# Texts among the options that name what is read; the others are labels, choices and the like.
_READ = ("corpus", "model", "source")


def _check_read_files(given: Mapping[str, Any]) -> None:
    """Refuse a file to write that another option or argument names, so that nothing is lost."""
    written = [one for name in _WRITTEN if isinstance(one := given.get(name), Path)]
    if isinstance(figure := given.get("figure"), Path):
        written += [figure.with_suffix(kind) for kind in (".png", ".svg")]
    for name, value in given.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            is_file = isinstance(one, Path) and name not in (*_WRITTEN, "figure")
            if one is None or not (is_file or name in _READ):
                continue
            for path in written:
                if path.is_file() and _is_among(path, str(one)):
                    raise InputError(f"cannot write {path}: it is read, too; give another name")


def _is_among(path: Path, named: str) -> bool:
    """Whether a file is what an option names, or one that a ``label=`` corpus is read from."""
    from lapefast.corpus import named_files

    _, is_text, text = named.partition("=")
    found = map(Path, named_files(text)) if is_text else ()
    return any(one.is_file() and path.samefile(one) for one in [Path(named), *found])


def check_output(path: Path) -> None:
    """Refuse, before any work is done, a file that could not be written after it."""
    if str(path) == "-":
        raise InputError("cannot write to standard output; give a file's name")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory; give a file's name")
    _check_parent(path)


def check_directory(path: Path) -> None:
    """Refuse, before any work is done, a directory that could not be written after it."""
    if str(path) == "-":
        raise InputError("cannot write a directory to standard output; give a name")
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        kind = "is a directory that is not empty" if path.is_dir() else "is a file"
        raise InputError(f"cannot write {path}: it {kind}; give a new directory's name")
    _check_parent(path)


def _check_parent(path: Path) -> None:
    directory = path.parent
    if not directory.is_dir():
        raise InputError(
            f"cannot write {path}: the directory {directory} does not exist; create it first"
        )
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write {path}: the directory {directory} is not writable ({error.strerror})"
        ) from error

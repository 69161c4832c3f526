"""The demo model and its text, made once per recipe and kept in the user's cache directory."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from lapefast.demo import model as training
from lapefast.demo import text
from lapefast.demo.model import Recipe, train_model, train_tokenizer
from lapefast.demo.text import LANGUAGES, compose
from lapefast.errors import InputError

__all__ = ["TOP_RATE", "Demo", "cache_directory", "load"]

_log = logging.getLogger(__name__)

TOP_RATE = 0.05
"""LAPE's top_rate for the demo model: the paper's 0.01 would leave it a few neurons only."""

_VERSIONS = ("babel", "tokenizers", "torch", "transformers")
_COMPLETE = "complete.json"
_NAME = "lapefast-demo"


@dataclass(frozen=True)
class Demo:
    """The demo model, its tokenizer, and its text.

    Attributes:
        model: a Llama in float32 on the CPU, in `eval()`.
        tokenizer: its byte-level BPE tokenizer.
        train: language -> text file it was trained on, one document per line.
        valid: language -> text file that it has not seen.
        directory: where the model and the tokenizer lie, as `save_pretrained` wrote them.
    """

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    train: dict[str, Path]
    valid: dict[str, Path]
    directory: Path


def load(progress: bool = True, recipe: Recipe | None = None) -> Demo:
    """The demo model, trained at the first call for a recipe and these library versions.

    Args:
        progress: show a bar while training.
        recipe: None takes the demo's own.

    Raises:
        InputError: the cache directory cannot be written.
    """
    recipe = recipe or Recipe()
    entry = cache_directory() / f"demo-{_key(recipe)}"
    demo = _read(entry)
    if demo is None:
        with _alone(entry.parent):
            demo = _read(entry)  # somebody else may have made it by now
            if demo is None:
                _build(recipe, entry, progress)
                demo = _read(entry)
    if demo is None:
        raise InputError(f"the demo model was written to {entry} but cannot be read from there")
    return demo


def cache_directory() -> Path:
    """`LAPEFAST_CACHE`, or else the directory for caches that the operating system suggests."""
    given = os.environ.get("LAPEFAST_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lapefast"


def _key(recipe: Recipe) -> str:
    sources = [Path(module.__file__).read_text("utf-8") for module in (text, training)]
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    content = [asdict(recipe), versions, platform.machine(), sources]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _build(recipe: Recipe, entry: Path, progress: bool) -> None:
    with _aside(entry) as directory:
        _log.info("Composing the demo's text and training its model, once; kept in %s", entry)
        languages = tqdm(LANGUAGES, "composing", unit="language", disable=not progress)
        texts = {
            language: compose(language, recipe.documents, 2 * recipe.seed) for language in languages
        }
        corpus = directory / "corpus"
        corpus.mkdir()
        for language, documents in texts.items():
            unseen = compose(language, recipe.valid_documents, 2 * recipe.seed + 1)
            for part, lines in (("train", documents), ("valid", unseen)):
                path = corpus / f"{language}.{part}.txt"
                path.write_text("".join(f"{line}\n" for line in lines), "utf-8", newline="\n")
        tokenizer = train_tokenizer(
            [document for documents in texts.values() for document in documents], recipe.vocabulary
        )
        model = train_model(recipe, tokenizer, texts, progress)
        tokenizer.save_pretrained(directory / "model")
        model.save_pretrained(directory / "model")
        digests = {str(path.relative_to(directory)): _digest(path) for path in _files(directory)}
        (directory / _COMPLETE).write_text(json.dumps(digests, indent=1), "utf-8")


def _read(entry: Path) -> Demo | None:
    """The entry's demo; None if it is missing or not as it was written."""
    try:
        digests = json.loads((entry / _COMPLETE).read_text("utf-8"))
        if any(_digest(entry / path) != digest for path, digest in digests.items()):
            raise ValueError("a file has changed")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        _log.warning("The cached demo model in %s is damaged (%s); making it again", entry, error)
        return None
    paths = {
        part: {language: entry / "corpus" / f"{language}.{part}.txt" for language in LANGUAGES}
        for part in ("train", "valid")
    }
    directory = entry / "model"
    model = LlamaForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # Files made with the model name it; they need not name this machine's directories.
    model.config._name_or_path = tokenizer.name_or_path = _NAME
    return Demo(model, tokenizer, **paths, directory=directory)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """The cache directory for one process at a time: who comes second finds the model made."""
    with _writable(cache):
        cache.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache, os.O_RDONLY)
    try:
        # Where the file system can't lock, both make it, and either's is good.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _aside(entry: Path) -> Iterator[Path]:
    """A directory that takes the entry's place once it is complete."""
    with _writable(entry.parent):
        directory = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        yield directory
        shutil.rmtree(entry, ignore_errors=True)
        try:
            os.rename(directory, entry)
        except OSError:
            # Another process was faster; its entry is as good as this one.
            if not (entry / _COMPLETE).exists():
                raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _writable(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the cache directory {cache} cannot be written ({error.strerror}); set "
            "LAPEFAST_CACHE to one that can"
        ) from error


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

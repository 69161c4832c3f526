"""The command line. One file per command; a library loads when a command needs it."""

from __future__ import annotations

import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

import typer

from lapefast.cli.categories import categories
from lapefast.cli.demo import demo
from lapefast.cli.doctor import doctor
from lapefast.cli.evaluate import evaluate
from lapefast.cli.export import export
from lapefast.cli.generate import generate
from lapefast.cli.identify import identify
from lapefast.cli.info import info
from lapefast.cli.merge import merge
from lapefast.cli.options import grouped
from lapefast.cli.profile import profile
from lapefast.cli.prune import prune
from lapefast.cli.report import report
from lapefast.cli.sample import sample
from lapefast.cli.stability import stability
from lapefast.cli.sweep import sweep
from lapefast.errors import InputError, RunFailed, RunStopped

__all__ = ["app", "main"]

_UNEXPECTED = 1
_BAD_INPUT = 2
_INTERRUPTED = 130
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

app = typer.Typer(
    name="lapefast",
    help="Find and control language-specific neurons in language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command; an error in it is one sentence and an exit code."""

    @functools.wraps(command)
    def guarded(*args, **kwargs) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            raise _exit(_unless_said(error, f"error: {error}"), _BAD_INPUT) from None
        except RunFailed as error:
            raise _exit(_unless_said(error, f"error: {error}"), _UNEXPECTED) from None
        except RunStopped as error:
            raise _exit(_unless_said(error, str(error)), 128 + error.signal) from None
        except KeyboardInterrupt:
            raise _exit("interrupted", _INTERRUPTED) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("LAPEFAST_DEBUG"):
                raise
            sentence = " ".join(str(error).split()) or "no message"
            raise _exit(
                f"error: unexpected {type(error).__name__}: {sentence} "
                "(LAPEFAST_DEBUG=1 shows where)",
                _UNEXPECTED,
            ) from None

    return guarded


_COMMANDS = (
    *(profile, stability, identify, evaluate, prune, categories),
    *(generate, sweep, sample, report, export),
    *(merge, info, demo, doctor),
)
for _command in _COMMANDS:
    app.command()(_guarded(grouped(_command)))


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from lapefast import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    With 0 if all is well, 2 for bad input, 1 for what was not foreseen, 130 if interrupted, and 128
    + the signal's number if a run was stopped by one and saved its state.
    """
    level = os.environ.get("LAPEFAST_LOG") or "WARNING"
    if level.upper() not in _LEVELS:
        typer.echo(
            f"error: LAPEFAST_LOG must be one of {', '.join(_LEVELS)}, got {level!r}", err=True
        )
        sys.exit(_BAD_INPUT)
    logging.basicConfig(format="%(message)s", level=level.upper())
    # A label that the terminal cannot write is escaped, as it is on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _unless_said(error: BaseException, message: str) -> str | None:
    """In one of several processes, what the first of them says is said once."""
    return None if getattr(error, "elsewhere", False) else message


def _exit(message: str | None, code: int) -> typer.Exit:
    if message is not None:
        typer.echo(message, err=True)
    return typer.Exit(code)

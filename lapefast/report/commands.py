"""The commands that a file's settings stand for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["commands", "public_name"]

_PROFILE = ("seq_len", "batch_size", "threshold", "dtype", "threads")
_MATRIX = ("batch_size", "max_tokens", "dtype", "random_sets", "seed", "threads")
# Options of `lapefast identify` by method, by the names of the parameters.
_METHODS = {
    "plnd": ("form",),
    "average-precision": ("top", "bottom"),
    "sharing": ("form", "threshold", "values"),
    "experts": ("experts", "share", "seed"),
}
_RATES = ("top_rate", "filter_rate", "activation_bar_ratio")
_IDENTIFY = (*_RATES, "form", "over")


def commands(described: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]) -> list[str]:
    """The commands that made the files, as far as their settings tell.

    Args:
        described: name -> metadata; the names are those of `lapefast.report.sections.Inputs`.
        files: name -> base name of the file.
    """
    lines = []
    for name, metadata in described.items():
        model = public_name(metadata.get("model") or "MODEL")
        if name not in files:
            continue
        if name == "profile" and "runs" not in metadata:
            given, corpora = metadata.get("corpora", ()), _corpora(metadata)
            options = _options(metadata, _PROFILE)
            until = metadata.get("until_stable")
            if until:
                options.append(f"--until-stable={until['overlap']}")
                options += _options(until["parameters"] or {}, _RATES)
            if (
                given
                and all(one.get("capped") for one in given)
                and not (until or {}).get("reached")
            ):
                options.append(f"--max-tokens={max(one['tokens'] for one in given)}")
            lines.append(["profile", model, *corpora, *options, "-o", files[name]])
        elif metadata.get("method") == "lape" and "profile" in files:
            options = _options(metadata.get("parameters") or {}, _IDENTIFY)
            lines.append(["identify", files["profile"], *options, "-o", files[name]])
        elif metadata.get("method") in _METHODS and _is_sets(name, files):
            lines.append(["identify", *_method(metadata), "-o", files[name]])
            details = files.get(f"{metadata['method']} in full")
            lines[-1] += ["--details", details] if details else []
        elif name == "matrix":
            neurons = _neurons(described, files, metadata.get("neurons_method"))
            texts = _corpora(metadata) or [
                f"--corpus={label}=SOURCE" for label in metadata.get("seq_len", ())
            ]
            lengths = sorted(set(metadata.get("seq_len", {}).values()))
            options = [f"--seq-len={lengths[0]}"] if len(lengths) == 1 else []
            options += _options(metadata, _MATRIX)
            lines.append(
                ["evaluate", model, "--neurons", neurons, *texts, *options, "-o", files[name]]
            )
    if "sweep" in files and "profile" in files:
        neurons = _neurons(described, files)
        model = next((one["model"] for one in described.values() if one.get("model")), "MODEL")
        given = ["--neurons", neurons, "--profile", files["profile"]]
        lines.append(["sweep", public_name(model), *given, "-o", files["sweep"]])
    return [shlex.join(["lapefast", *line]) for line in lines]


def public_name(name: str) -> str:
    """The name; of an absolute path its last part alone, since the rest is this machine's."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(name).is_absolute():
            return kind(name).name
    return name


def _method(metadata: Mapping[str, Any]) -> list[str]:
    """The model and the options of a method that runs one."""
    method, parameters = metadata["method"], dict(metadata.get("parameters") or {})
    options = [f"--method={method}"]
    options += _corpora(metadata)
    if method == "plnd":
        options.append(f"--kinds={','.join(parameters.pop('kinds', ()))}")
        top = parameters.pop("top", None) or {}
        options += [
            f"--top-{option}={count}"
            for option, kinds in (("ffn", {"ffn"}), ("attention", {"query_key", "value"}))
            for count in sorted({top[kind] for kind in kinds & top.keys()})
        ]
        for threshold in sorted({*(parameters.pop("threshold", None) or {}).values()}):
            options.append(f"--score-threshold={threshold}")
    if method == "sharing":
        options.append("--examples=EXAMPLES")
    if method == "experts":
        if parameters.get("top") is not None:
            options.append(f"--high={parameters['top']}")
        options += ["--only"] * bool(parameters.get("only"))
    options += _options(parameters, _METHODS[method])
    return [
        public_name(metadata.get("model") or "MODEL"),
        *options,
        *_options(metadata, ("seq_len", "max_documents", "batch_size", "dtype", "threads")),
        *(
            f"--{name}={metadata[name]}"
            for name, usual in (("document", "line"), ("field", "text"))
            if metadata.get(name, usual) != usual
        ),
        *["--no-special-tokens"] * (metadata.get("special_tokens") is False),
    ]


def _corpora(metadata: Mapping[str, Any]) -> list[str]:
    return [
        f"--corpus={one['label']}={public_name(one['source'] or 'SOURCE')}"
        for one in metadata.get("corpora", ())
    ]


def _neurons(
    described: Mapping[str, Mapping[str, Any]], files: Mapping[str, str], method: str | None = None
) -> str:
    """The neuron file of a method, or the only one there is; else a word in its place."""
    sets = [name for name in described if _is_sets(name, files)]
    found = [name for name in sets if described[name].get("method") == method]
    chosen = found if method else sets
    return files[chosen[0]] if len(chosen) == 1 else "NEURONS"


def _is_sets(name: str, files: Mapping[str, str]) -> bool:
    return name in files and name not in (
        *("profile", "matrix", "sweep"),
        *("experts in full", "sharing in full"),
    )


def _options(metadata: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [
        f"--{name.replace('_', '-')}={metadata[name]}"
        for name in names
        if metadata.get(name) is not None and not isinstance(metadata[name], (dict, list))
    ]

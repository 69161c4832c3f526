"""The commands that a file's settings stand for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["BUILT_IN", "commands", "public_name"]

_About = Mapping[str, Any]
"""Metadata."""
_Described = Mapping[str, _About]
_Files = Mapping[str, str]
_Words = list[str]

BUILT_IN = "built in"
"""The source of the prompts that `lapefast sweep` has of its own."""

_PROFILE = ("seq_len", "batch_size", "threshold", "dtype", "threads")
_GENERATED = ("max_new_tokens", "random_sets", "batch_size", "dtype", "seed", "threads")
_MATRIX = ("batch_size", "max_tokens", "dtype", "random_sets", "seed", "threads")
# Options of `lapefast identify` by method, by the names of the parameters.
_METHODS = {
    "plnd": ("form",),
    "average-precision": ("top", "bottom"),
    "sharing": ("form", "threshold", "values"),
    "experts": ("experts", "share", "seed"),
}
# What `lapefast identify` always does, by the names of settings.
_FIXED = {
    "average-precision": {"longer": "drop"},
    "sharing": {
        "attribution": True,
        "top": 800,
        "thresholds": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],
    },
    "experts": {"form": "identity", "threshold": None, "longer": "cut", "clusters": None},
}
_RATES = ("top_rate", "filter_rate", "activation_bar_ratio")
_IDENTIFY = (*_RATES, "form", "over")


def commands(described: _Described, files: _Files) -> list[str]:
    """The commands that made the files, as far as their settings tell.

    Of a file that the command line cannot make, a comment says why.

    Args:
        described: name -> metadata; the names are those of `lapefast.report.sections.Inputs`.
        files: name -> base name of the file.
    """
    lines: list[_Words] = []
    comments = []
    for name, metadata in described.items():
        if name not in files:
            continue
        why = _beyond(metadata) if _is_sets(name, files) else ""
        if why:
            comments.append(f"# {files[name]!r} was made in Python: {why}")
        elif name == "profile" and "runs" not in metadata:
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
            lines.append(["profile", _model(metadata), *corpora, *options, "-o", files[name]])
        elif metadata.get("method") == "lape" and "profile" in files:
            options = _options(metadata.get("parameters") or {}, _IDENTIFY)
            lines.append(["identify", files["profile"], *options, "-o", files[name]])
        elif metadata.get("method") in _METHODS and _is_sets(name, files):
            lines.append(["identify", *_method(metadata), "-o", files[name]])
            full = f"{metadata['method']} in full"
            if full in files and _agree(described.get(full, {}), metadata):
                lines[-1] += ["--details", files[full]]
        elif name in _EVALUATIONS:
            lines.append([*_EVALUATIONS[name](metadata, described, files), "-o", files[name]])
    return [*(shlex.join(["lapefast", *line]) for line in lines), *comments]


def public_name(name: str) -> str:
    """The name; of an absolute path its last part alone, since the rest is this machine's."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(name).is_absolute():
            return kind(name).name
    return name


def _beyond(metadata: _About) -> str:
    """Why the command line cannot make such neuron sets; empty where it can."""
    if metadata.get("part"):
        return f"it is the part {metadata['part']!r} of a method's neurons"
    method, settings = metadata.get("method"), _settings(metadata)
    beyond = [
        name
        for name, usual in _FIXED.get(method, {}).items()
        if name in settings and settings[name] != usual
    ]
    if metadata.get("corpora") and "max_documents" in settings and not settings["max_documents"]:
        beyond.append("max_documents")
    if method == "plnd":
        top, threshold = settings.get("top") or {}, settings.get("threshold") or {}
        alike = (top.get(kind) for kind in ("query_key", "value") if kind in top)
        beyond += ["top"] * (len(set(alike)) > 1)
        beyond += ["threshold"] * (len(set(threshold.values())) > 1)
    return f"the command line has no option for its {', '.join(beyond)}" if beyond else ""


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
        options.append(f"--examples={metadata.get('examples_source') or 'EXAMPLES'}")
    if method == "experts":
        if parameters.get("top") is not None:
            options.append(f"--high={parameters['top']}")
        options += ["--only"] * bool(parameters.get("only"))
    options += _options(parameters, _METHODS[method])
    return [
        _model(metadata),
        *options,
        *_options(metadata, ("seq_len", "max_documents", "batch_size", "dtype", "threads")),
        *(
            f"--{name}={metadata[name]}"
            for name, usual in (("document", "line"), ("field", "text"))
            if metadata.get(name, usual) != usual
        ),
        *["--no-special-tokens"] * (metadata.get("special_tokens") is False),
    ]


def _matrix(metadata: _About, described: _Described, files: _Files) -> _Words:
    neurons = _neurons(described, files, metadata.get("neurons_method"))
    texts = _corpora(metadata) or [
        f"--corpus={label}=SOURCE" for label in metadata.get("seq_len", ())
    ]
    lengths = sorted(set(metadata.get("seq_len", {}).values()))
    options = [f"--seq-len={lengths[0]}"] if len(lengths) == 1 else []
    given = ["--neurons", neurons, *_labels(metadata, "neurons"), *texts]
    given += [*options, *_options(metadata, _MATRIX)]
    return ["evaluate", _model(metadata), *given]


def _pruning(metadata: _About, described: _Described, files: _Files) -> _Words:
    experts = ["--experts", files.get("experts in full", "EXPERTS")]
    form = [f"--rate={metadata['rate']}", f"--form={metadata['pruning']}"]
    given = [*_labels(metadata, "experts"), *_corpora(metadata)]
    given += _options(metadata, ("seq_len", *_MATRIX))
    return ["prune", _model(metadata), *experts, *form, *given]


def _deactivation(metadata: _About, *_: Any) -> _Words:
    examples = f"--examples={metadata.get('examples_source') or 'EXAMPLES'}"
    options = _options(metadata, ("threshold", "values", *_MATRIX))
    return ["categories", _model(metadata), examples, *options]


def _sweep(metadata: _About, described: _Described, files: _Files) -> _Words:
    given = ["--neurons", _neurons(described, files, metadata.get("neurons_method"))]
    given += ["--profile", files.get("profile", "PROFILE")]
    given += [] if metadata.get("pairs") else _labels(metadata, "neurons")
    if metadata.get("prompts_source") != BUILT_IN:
        given.append(f"--prompts={metadata.get('prompts_source') or 'PROMPTS'}")
    given += [f"--pair={source}={target}" for source, target in metadata.get("pairs") or ()]
    given += _corpora(metadata)
    shifted = metadata.get("shift_layers") or ()
    given += [f"--shift-layer={layer}" for layer in shifted]
    capped = [one["tokens"] for one in metadata.get("corpora") or () if one.get("capped")]
    given += [f"--max-tokens={max(capped)}"] if capped else []
    given += [*_options(metadata, ("strength", "seq_len", "where")), *_generation(metadata)]
    # A file of before there were settings names no model; the others do.
    named = [metadata, *described.values()]
    return ["sweep", _model(next((one for one in named if one.get("model")), {})), *given]


def _sampled(metadata: _About, described: _Described, files: _Files) -> _Words:
    method, means = metadata.get("neurons_method"), metadata.get("values") == "given"
    # The values that neurons are set to are in what --details writes, not in a neuron file.
    neurons = _neurons(described, files, method) if means else files.get(f"{method} in full")
    given = ["--neurons", neurons or "DETAILS"]
    given += ["--profile", files.get("profile", "PROFILE")] if means else []
    given += _labels(metadata, "neurons")
    given += [*_options(metadata, ("samples", "temperature")), *_generation(metadata)]
    return ["sample", _model(metadata), *given]


def _generation(metadata: _About) -> _Words:
    """How texts were generated, and how their languages were told."""
    codes = metadata.get("languages") or {}
    return [
        *(f"--language={label}={code}" for label, code in codes.items()),
        *["--any-language"] * (metadata.get("restrict") is False),
        *_options(metadata, _GENERATED),
    ]


_EVALUATIONS = {
    "matrix": _matrix,
    "sweep": _sweep,
    "sampled": _sampled,
    "pruning": _pruning,
    "deactivation": _deactivation,
}


def _model(metadata: _About) -> str:
    return public_name(metadata.get("model") or "MODEL")


def _settings(metadata: _About) -> dict[str, Any]:
    """Those of a method and of its run by one name each."""
    return {**metadata, **(metadata.get("parameters") or {})}


def _agree(full: _About, sets: _About) -> bool:
    """Whether neuron sets may come from the run that all details are of."""
    own = _settings(sets)
    known = {**_settings(full), "parameters": None, "notes": None}
    return all(own.get(name) == value for name, value in known.items() if value is not None)


def _labels(metadata: _About, entry: str) -> _Words:
    """The labels that an entry has something of."""
    labels = list(metadata.get(entry) or ())
    if any("," in label for label in labels):
        return ["--labels=LABELS"]  # the command line takes such labels only all together
    return [f"--labels={','.join(labels)}"] if labels else []


def _corpora(metadata: Mapping[str, Any]) -> list[str]:
    return [
        f"--corpus={one['label']}={_source(one['source'])}" for one in metadata.get("corpora", ())
    ]


def _source(name: str | None) -> str:
    """What is in angle brackets was in memory."""
    return "SOURCE" if not name or name.startswith("<") else public_name(name)


def _neurons(described: _Described, files: _Files, method: str | None = None) -> str:
    """The neuron file of a method, or the only one there is; else a word in its place."""
    sets = [name for name in described if _is_sets(name, files)]
    found = [name for name in sets if described[name].get("method") == method]
    chosen = found if method else sets
    return files[chosen[0]] if len(chosen) == 1 else "NEURONS"


def _is_sets(name: str, files: _Files) -> bool:
    no_sets = name == "profile" or name in _EVALUATIONS or name.endswith(" in full")
    return name in files and not no_sets


def _options(metadata: _About, names: tuple[str, ...]) -> _Words:
    return [
        f"--{name.replace('_', '-')}={metadata[name]}"
        for name in names
        if metadata.get(name) is not None and not isinstance(metadata[name], (dict, list))
    ]

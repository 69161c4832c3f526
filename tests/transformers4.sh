#!/bin/sh
# The tests that touch models, under the oldest supported transformers, in an environment of its own.
set -eu
venv=.venvs/transformers4
[ -x $venv/bin/python ] || "$PYTHON" -m venv $venv
unset PIP_CONSTRAINT # older libraries go with it
# Of these data the demo's texts are made, which tests judge.
data=$(grep '^babel==' constraints.txt)
$venv/bin/python -m pip install --no-compile --quiet "$TORCH"
# The native library that .venv built stands in the tree and serves here too.
LAPEFAST_BUILD_NATIVE=0 $venv/bin/python -m pip install --no-compile --quiet "transformers==4.57.*" "$data" \
    --editable '.[test]'
# The trained model, on all cores before the tests share them.
$venv/bin/python -c "from lapefast import demo; demo.load()"
$venv/bin/python -m pytest --timeout=300 -m "not long" tests/models tests/recording tests/steering \
    tests/profiling tests/evaluate tests/engines

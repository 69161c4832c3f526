#!/bin/sh
# A wheel built in isolation from a clean copy of the sources must work from any directory; so must
# the pure-Python package.
set -eu
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard | xargs -0 tar -cf - | tar -xf - -C "$work/source"

venv=$work/venv
"$PYTHON" -m venv "$venv"
"$venv/bin/python" -m pip install --no-compile --quiet "$TORCH"

check() { # wheel, what to run
    "$venv/bin/python" -m pip install --no-compile --quiet "$1[test]"
    (cd "$work" && "$venv/bin/lapefast" doctor && "$venv/bin/python" -m pytest --timeout=300 -q -p no:cacheprovider \
        --rootdir "$root" -c "$root/pyproject.toml" -m "not long" $2)
}

echo "wheel with the native library"
# The CUDA kernels, which take longest, are compiled in .venv and tested there.
CMAKE_ARGS=-DLAPEFAST_CUDA=OFF "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$work/native" "$work/source"
check "$(ls "$work"/native/lapefast-*.whl)" \
    "$root/tests/ops $root/tests/properties $root/tests/neurons $root/tests/profiles
    $root/tests/corpus $root/tests/steering $root/tests/cli $root/tests/test_build.py
    $root/tests/test_files.py $root/tests/recording $root/tests/test_concurrency.py"
"$venv/bin/python" "$root/tests/wheel_smoke.py"

echo "wheel without it"
LAPEFAST_BUILD_NATIVE=0 "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$work/pure" "$work/source"
"$venv/bin/python" -m pip uninstall --quiet --yes lapefast
check "$(ls "$work"/pure/lapefast-*.whl)" "$root/tests/recording"
(cd "$work" && "$venv/bin/python" -c "
from importlib.util import find_spec
assert find_spec('lapefast') and not find_spec('lapefast._native'), 'the native library is there'")

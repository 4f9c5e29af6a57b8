# Everything runs in .venv. TORCH overrides the torch that is installed, PYTHON the interpreter it starts from.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: help setup demo test test-all sanitize wheels lint format verify-gpu bench bench-gpu clean

help:
	@echo "make demo      train a tiny reasoning model on this machine, from nothing, in minutes"
	@echo "make test      the test suite;  make test-all adds the slow ones"
	@echo "make setup     only .venv, torch and the extension;  then: .venv/bin/longtrace --help"
	@echo "make sanitize  the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make wheels    an sdist and a wheel for this Python in dist/, as a release uploads them"
	@echo "make verify-gpu  the GPU kernels without a GPU: interpreted, compiled for five parts, one table"
	@echo "make lint      ruff check and format;  make bench  times this trainer against TRL"
	@echo "make bench-gpu on a GPU machine: parity and times of every kernel, ten minutes; ARGS=--dry-run anywhere;"
	@echo "               PYTHON=python3 make bench-gpu takes that Python's torch and needs no network"

.venv/core: $(SOURCES)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "creating .venv"; $(PYTHON) -m venv --clear .venv || \
	  { echo "this Python cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv"; exit 1; }; }
	@echo "installing $(TORCH) (skipped when a fitting torch is there)"
	@$(PIP) install "$(TORCH)" "setuptools>=77" "pybind11>=2.13"
	@echo "building longtrace and installing what it needs"
	@$(PIP) install --no-build-isolation --editable .
	@touch $@

.venv/dev: .venv/core
	@echo "installing the test tools"
	@$(PIP) install --no-build-isolation --editable ".[dev]"
	@touch $@

setup: .venv/core
	@$(BIN)/longtrace doctor

demo: .venv/core
	@$(BIN)/longtrace demo $(ARGS)

test: .venv/dev
	@$(BIN)/pytest -n 2 -m "not slow" $(ARGS)

test-all: .venv/dev
	@$(BIN)/pytest -n 2 $(ARGS)

sanitize: .venv/dev
	@tests/sanitize.sh $(ARGS)

wheels: .venv/dev
	@tests/wheels.sh

lint: .venv/dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/python tests/file_sizes.py

format: .venv/dev
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

verify-gpu: .venv/dev
	@$(BIN)/python tests/kernels/verify_gpu.py

bench: .venv/dev
	@$(PIP) install --no-build-isolation --editable ".[bench]"
	@$(BIN)/longtrace bench sft_throughput $(ARGS)

# With PYTHON given, its own torch is used and nothing is fetched; else .venv is.
ifeq ($(origin PYTHON),file)
GPU_PYTHON := $(CURDIR)/$(BIN)/python
bench-gpu: .venv/core
else
GPU_PYTHON = $(shell $(PYTHON) -c 'import sys; print(sys.executable)')
bench-gpu: gpu-install
endif

.PHONY: gpu-install
gpu-install:
	@$(PYTHON) -c "import torch, rich, matplotlib, transformers" || \
	  { echo "$(PYTHON) has to have torch, transformers, rich and matplotlib; without PYTHON=, make installs them in .venv"; exit 1; }
	@echo "building longtrace for $(PYTHON), with what it has"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .

bench-gpu:
	@mkdir -p runs && cd runs && $(GPU_PYTHON) -c "from longtrace.bench.gpu import main; main()" --out bench-gpu $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info kernels/*.so

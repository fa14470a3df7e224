# Every target sets up .venv from constraints.txt first, and again whenever the pins change.
# PYTHON   the interpreter that makes the environments (3.11 or later)
# PIP_ARGS more arguments for pip, for example an index that carries the CPU-only build of torch
# WORKERS  how many processes the tests run in

SHELL := /bin/bash
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= $(shell nproc 2>/dev/null | awk '{n = $$1; if (n < 2) n = 2; if (n > 8) n = 8; print n}')
export FEWBIT_DATA ?= $(abspath ../shared/data)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCHMARKS ?= accuracy few_bits exactness speed probe litert targets readers gptq clustering coding qat qat_small step_cost pruned_graphs pruning_oneshot pruning_latency pruning sparsity deep_compression
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready

.PHONY: help demo test check bench peers clean

help:
	@echo "make demo    the demonstration: quantize, export, verify and measure a small network"
	@echo "make test    the tests"
	@echo "make check   formatting, lint, types and the tests"
	@echo "make bench   every benchmark, one after the other (BENCHMARKS='speed probe' for some)"
	@echo "make peers   the environment of the tools we are compared with ($(PEERS))"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fewbit needs Python 3.11 or later; set PYTHON=python3.11 (found: $$($(PYTHON) --version))"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet $(PIP_ARGS) -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/fewbit demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

bench: $(READY)
	@failed=""; for name in $(BENCHMARKS); do \
	  echo "== $$name"; $(BIN)/python "benchmarks/$$name.py"; code=$$?; \
	  if [ $$code -eq 77 ]; then echo "$$name: skipped"; elif [ $$code -ne 0 ]; then failed="$$failed $$name"; fi; \
	done; \
	if [ -n "$$failed" ]; then echo "benchmarks that failed or missed a bar:$$failed"; exit 1; fi

$(PEERS_READY): benchmarks/peers-requirements.txt benchmarks/peers-requirements-nodeps.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet $(PIP_ARGS) -r benchmarks/peers-requirements.txt
	$(PEERS)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps -r benchmarks/peers-requirements-nodeps.txt
	@touch $@

peers: $(PEERS_READY)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two commands on a fresh machine (Python >= 3.10, a C++ compiler; nvcc and a GPU optional):
#
#   make bench    build what can be built here and measure ResNet-50: table, out/bench.json, out/bench.png
#   make test     build the CUDA kernels for the CPU and run the tests; with a GPU also those that need one
#
# Both create .venv once and reuse it. Knobs: PYTHON (which Python), VENV (where), TORCH (what to install),
# BUILD (auto|cuda|none|host, for bench), ARGS (passed on), JOBS (parallel test processes).
# Inner loop: make check (lint, types, a case of everything); whole suite: make test-all.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
BUILD ?= auto
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# each kind of build has its own objects and its own library: one never replaces another
LIBRARY = $(PY) setup.py --quiet build_ext --inplace
# of the GPU's code, only that for the GPU that is here; a wheel has all of it
NATIVE = TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-native}"
# The same on every machine: without a GPU, one thread a process. What needs a GPU runs behind it, where there is one.
PYTEST = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal
HAS_GPU = $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

.PHONY: help bench bench-check docs api check test test-all test-gpu test-machines lint types digits gate install \
  library-test clean
.DEFAULT_GOAL := help

help:
	@sed -n '3,8p' Makefile | cut -c3-
	@echo "also: make check | test-all | test-gpu | test-machines (other vector units and threads) | lint | types | digits |"
	@echo "  gate (compile every kernel for every architecture) | clean |"
	@echo "  bench-check (against the last recorded result of this device) | docs (pages and charts from the results) |"
	@echo "  api (the reference of the public names, into out/api) |"
	@echo "  properties (a longer search by hypothesis)"

# torch by name and newest; setuptools and ninja beside it, because the build runs in this environment
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	  f"resnet_fused needs Python >= 3.10, $(PYTHON) is {v[0]}.{v[1]}; name another: make PYTHON=python3.12")'
	@echo "setting up $(VENV) with $(TORCH): some minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade pip 'setuptools>=77' wheel ninja $(foreach package,$(TORCH),'$(package)')
	@touch $@

# the package in place and its extras; the library of csrc/ is built by the targets that need it
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	@RESNET_FUSED_BUILD=none $(PIP) install --quiet --no-build-isolation --editable '.[bench,test]'
	@touch $@

install: $(VENV)/.installed

bench: install
	@export RESNET_FUSED_BUILD=$(BUILD) $(NATIVE); $(LIBRARY)
	@$(PY) -c 'from resnet_fused import _library; print("compiled kernels:", _library.status())'
	@$(VENV)/bin/resnet-fused bench --json out/bench.json --chart out/bench.png $(ARGS)

# the cases of this device's last recorded result again: exit code 1 where we lost more than the spread
bench-check: install
	@export RESNET_FUSED_BUILD=$(BUILD) $(NATIVE); $(LIBRARY)
	@$(VENV)/bin/resnet-fused bench --check $(ARGS)

docs: install
	@$(PY) -m tools.pages && $(PY) -m tools.ops_page

# the reference of every public name, from the docstrings
api: install
	@$(PY) -m pdoc --docformat google --output-directory out/api \
	  resnet_fused resnet_fused.functional resnet_fused.nn resnet_fused.models resnet_fused.evaluate
	@echo "wrote out/api/index.html"

library-test: install
	@export RESNET_FUSED_BUILD=host; $(LIBRARY)
	@$(PY) -c 'from resnet_fused import _library; print("compiled kernels:", _library.status())'

# three samples of one suite, each a part of the next (tests/support/tiers.py)
check: lint types library-test
	$(PYTEST) --tier=check $(ARGS)

test: library-test
	$(PYTEST) --tier=test $(ARGS)
	@if $(HAS_GPU); then $(MAKE) --no-print-directory test-gpu; fi

test-all: library-test
	$(PYTEST) --tier=all $(ARGS)
	@if $(HAS_GPU); then $(MAKE) --no-print-directory test-gpu; fi

test-gpu: install
	@export RESNET_FUSED_BUILD=auto $(NATIVE); $(LIBRARY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m gpu --tier=all $(ARGS)

# The suite as older and smaller machines would run it. TIER and SETTINGS choose; every setting runs, then failures count.
TIER ?= test
SETTINGS ?= default two-threads avx2 oldest
test-machines: library-test
	@failed=; for setting in $(SETTINGS); do \
	  case $$setting in \
	    default) vars=; tier=$(TIER);; \
	    two-threads) vars=OMP_NUM_THREADS=2; tier=$(TIER);; \
	    avx2) vars='ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2'; tier=$(TIER);; \
	    oldest) vars='ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41'; tier=check;; \
	    *) echo "unknown setting $$setting"; exit 2;; \
	  esac; \
	  echo "=== $$setting: $$vars, tier $$tier"; \
	  env CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $$vars $(PY) -m pytest -q -n $(JOBS) --dist worksteal --tier=$$tier $(ARGS) \
	    || failed="$$failed $$setting"; \
	done; \
	if [ -n "$$failed" ]; then echo "=== FAILED under:$$failed"; exit 1; fi; echo "=== passed under: $(SETTINGS)"

# many random cases, others each time; EXAMPLES per test
properties: library-test
	RESNET_FUSED_EXAMPLES=$(or $(EXAMPLES),2000) $(PYTEST) tests/functional/test_properties.py $(ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: install
	$(PY) -m mypy

digits: install
	$(PY) examples/digits.py $(ARGS)

# exit code 2 of the CUDA gate: there is no toolkit here to compile with, which it says; that is no failure
gate: install
	$(PY) -m tools.compile_gate.triton_gate --quick --jobs $(JOBS)
	$(PY) -m tools.compile_gate.cuda_gate || [ $$? = 2 ]

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	rm -f resnet_fused/_C*
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# Two commands on a fresh machine (Python >= 3.10, a C++ compiler; nvcc and a GPU optional):
#
#   make bench    build what can be built here and measure ResNet-50: table, out/bench.json, out/bench.png
#   make test     build the CUDA kernels for the CPU and run the tests
#
# Both create .venv once and reuse it. Knobs: PYTHON (which Python), VENV (where), TORCH (what to install),
# BUILD (auto|cuda|none|host, for bench), ARGS (passed on), JOBS (parallel test processes).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
BUILD ?= auto
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# objects are kept per kind of build; the library is linked anew, so that one kind never stands in for another
LIBRARY = rm -f resnet_fused/_C.so && $(PY) setup.py --quiet build_ext --inplace

.PHONY: help bench bench-check docs test lint types digits gate install library-test clean
.DEFAULT_GOAL := help

help:
	@sed -n '3,7p' Makefile | cut -c3-
	@echo "also: make lint | types | digits | gate (compile every kernel for every architecture) | clean |"
	@echo "  bench-check (against the last recorded result of this device) | docs (pages and charts from the results) |"
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
	@export RESNET_FUSED_BUILD=$(BUILD); $(LIBRARY)
	@$(PY) -c 'from resnet_fused import _library; print("compiled kernels:", _library.status())'
	@$(VENV)/bin/resnet-fused bench --json out/bench.json --chart out/bench.png $(ARGS)

# the cases of this device's last recorded result again: exit code 1 where we lost more than the spread
bench-check: install
	@export RESNET_FUSED_BUILD=$(BUILD); $(LIBRARY)
	@$(VENV)/bin/resnet-fused bench --check $(ARGS)

docs: install
	@$(PY) -m tools.pages

library-test: install
	@export RESNET_FUSED_BUILD=host; $(LIBRARY)
	@$(PY) -c 'from resnet_fused import _library; print("compiled kernels:", _library.status())'

test: library-test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)

# many random cases, others each time; EXAMPLES per test
properties: library-test
	OMP_NUM_THREADS=1 RESNET_FUSED_EXAMPLES=$(or $(EXAMPLES),2000) $(PY) -m pytest -n $(JOBS) tests/test_properties.py $(ARGS)

lint: install
	$(PY) -m ruff check .

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
	rm -f resnet_fused/_C.so resnet_fused/_build_info.json
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

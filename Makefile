# make run     serve the demo model, send it traffic, tune it live      make test   all tests
# make prove   the whole loop, unattended, with the evidence at the end make check  ruff and mypy
# make soak    minutes of processes that are killed, stopped and starved, and properties on new random examples
# Each of them sets up .venv first; nothing to do when it is up to date. PYTHON=/path/to/python3.12 chooses another.

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$name; break; }; done)
endif
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TESTED := $(VENV)/installed-for-tests
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: run test soak prove check setup clean
.DEFAULT_GOAL := run

run: $(STAMP)
	$(BIN)/tuner run --config configs/demo.yaml

test: $(TESTED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --hypothesis-profile ci

soak: $(TESTED)
	$(BIN)/python -m pytest -m "slow or hypothesis"

prove: $(STAMP)
	$(BIN)/python -m tuner.prove

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(STAMP)

# Without an NVIDIA driver the CPU build of torch comes first, from wherever pip is told to look, else from PyTorch;
# the constraints are met by either build.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed, but none was found." \
		"Install it, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { echo "error: no virtual environment could be made in $(VENV)." \
		"On Debian and Ubuntu install python3-venv first." >&2; rm -rf $(VENV); exit 1; }
	@echo "Installing into $(VENV) (about 1 GB the first time; this takes some minutes) ..."
	@if ! command -v nvidia-smi >/dev/null && ! $(BIN)/python -c "$$HAS_TORCH"; then \
		echo "No NVIDIA driver found: the CPU build of torch $(TORCH) is taken."; \
		$(BIN)/pip install --quiet 'torch==$(TORCH)+cpu' -c constraints.txt 2>/dev/null \
		|| $(BIN)/pip install --quiet 'torch==$(TORCH)+cpu' -c constraints.txt --extra-index-url $(TORCH_CPU_INDEX); \
	fi
	@$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

# What only tests need: Triton's interpreter, which a CUDA build of torch has brought along already.
$(TESTED): $(STAMP)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet -e '.[kernels]' -c constraints.txt
	@touch $(TESTED)

define HAS_TORCH
import importlib.metadata as installed, sys
try: sys.exit(installed.version('torch').split('+')[0] != '$(TORCH)')
except installed.PackageNotFoundError: sys.exit(1)
endef
export HAS_TORCH

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

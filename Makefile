# Every target does its own set-up: the first run makes .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install quickstart test lint methods-table

install: .venv/installed

# An installed torch that satisfies the ranges is left alone: a machine with a working CUDA or ROCm build keeps it, and
# the triton that belongs to it; elsewhere the tested versions are installed into an environment of their own.
TORCH_FITS := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))

.venv/constraints.txt: constraints.txt
	@$(PYTHON) -m venv --clear --system-site-packages .venv
	@if $(BIN)/python -c '$(TORCH_FITS)' 2>/dev/null; then \
	  echo "keeping the installed torch"; \
	  grep -v -E '^(torch|triton)==' constraints.txt > .venv/constraints.txt; \
	else \
	  $(PYTHON) -m venv --clear .venv; \
	  cp constraints.txt .venv/constraints.txt; \
	fi

.venv/installed: pyproject.toml .venv/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e ".[dev]"
	@touch $@

quickstart: install
	$(BIN)/peftzoo train quickstart/dates

test: install
	$(BIN)/python -m pytest

methods-table: install
	$(BIN)/python -m peftzoo.method_table

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

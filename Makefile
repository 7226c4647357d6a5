# danlu: everything from a fresh clone needs only Python >= 3.11 and make.
#
#   make quickstart   the life of a model in one command, in under ten minutes
#   make test         the tests, under ten minutes on two cores
#   make test-slow    the long ones: kills, processes, browsers
#   make lint         ruff, mypy, import-linter
#
# A CPU build of torch on Linux:  make quickstart TORCH_INDEX=<index of CPU wheels>  (see README)

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

# The optional real data that some tests and `danlu reproduce` read; docs/data.md lists its layout.
export DANLU_DATA

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow lint format clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "danlu needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV)

# torch first and alone, so that no other package picks its build.
$(VENV)/.installed: pyproject.toml constraints.txt requirements-demo.txt | $(BIN)/python
	@echo "Installing danlu into $(VENV) …"
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[serve,gguf]'
	@$(PIP) --no-deps --requirement requirements-demo.txt
	@touch $@

$(VENV)/.tested: $(VENV)/.installed requirements-data.txt
	@echo "Installing what the tests need …"
	@$(PIP) --editable '.[test,track]'
	@$(PIP) --no-deps --requirement requirements-data.txt
	@$(BIN)/danlu get smollm2
	@touch $@

$(VENV)/.linted: $(VENV)/.installed
	@$(PIP) --editable '.[lint]'
	@touch $@

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	@$(BIN)/danlu quickstart

test: $(VENV)/.tested
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.tested
	$(BIN)/python -m pytest -m slow --durations=20

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.linted
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info

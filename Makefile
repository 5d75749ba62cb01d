# make serve    environment, install, start with nano, the embedded default model (ARGS="--port 9000 …" adds flags)
# make test     environment, install, lint, types and the whole suite
# make check    lint, types and import direction only
# make bench    one engine step timed on a mid-size random checkpoint
# make gpu      parity and timings on a CUDA device, where there is one
# make setup    only the environment
#
# TORCH chooses the torch to install: `make test TORCH=torch==2.13.0`. It goes in first, so that nothing else pulls one.

TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# A stamp for each torch requirement: changing TORCH or the metadata installs again, anything else does not.
STAMP := $(VENV)/.$(subst /,_,$(subst $(eval) ,_,$(strip $(TORCH))))

.PHONY: setup serve test check bench gpu

setup: $(STAMP).installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hybrid needs Python 3.11 or newer; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP).torch: | $(BIN)/python
	@rm -f $(VENV)/.*.torch $(VENV)/.*.installed $(VENV)/.*.tests
	$(PIP) '$(TORCH)'
	@touch '$@'

$(STAMP).installed: setup.cfg pyproject.toml $(STAMP).torch
	$(PIP) --editable .
	@touch '$@'

$(STAMP).tests: setup.cfg pyproject.toml $(STAMP).torch
	$(PIP) --editable '.[test]'
	@touch '$@' '$(STAMP).installed'

serve: $(STAMP).installed
	@$(BIN)/hybrid serve $(ARGS)

check: $(STAMP).tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest $(ARGS)

bench: $(STAMP).installed
	$(BIN)/python -m tests.bench.step $(ARGS)

gpu: $(STAMP).installed
	$(BIN)/python -m tests.gpu $(ARGS)

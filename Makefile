# `make scan` and `make test` are all the set-up there is: each makes .venv on first use and again when
# pyproject.toml changes. To use another interpreter or another build of torch:
#   make scan PYTHON=python3.12 TORCH="torch==2.13.0 --index-url URL-OF-THE-BUILD-YOU-WANT"

PYTHON ?= python3
VENV ?= .venv
# Named first and alone: anything newer that "torch" could resolve to is a CUDA build of several gigabytes.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := $(wildcard src tests benchmarks examples hatch_build.py)

.DEFAULT_GOAL := help
.PHONY: help install scan test check format oracles readme clean

help:
	@echo "make scan     scan the shipped text model: a table here, and a report to open in a browser"
	@echo "make test     run the tests"
	@echo "make check    what CI runs: ruff, pyright, tests"
	@echo "make format   let ruff format and mend"
	@echo "make oracles  write test fixtures from outside implementations, each in an environment of its own"
	@echo "make readme   rewrite the generated parts of README.md"
	@echo "make clean    remove environments and caches"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "headwise needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "no virtual environment could be made; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@echo "Installing headwise into $(VENV) (about 1.5 GB; once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

scan: $(INSTALLED)
	@$(BIN)/headwise scan

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest $(PYTEST_ARGS)

format: $(INSTALLED)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

oracles: $(INSTALLED)
	$(BIN)/python tests/oracles/make.py

readme: $(INSTALLED)
	$(BIN)/python tests/readme.py

clean:
	rm -rf $(VENV) .venv-ci .venv-oracles .pytest_cache .ruff_cache .hypothesis build dist

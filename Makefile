# Needs make and Python 3.10 or newer (another one: make test PYTHON=python3.12); everything else goes into .venv.
# More for the program behind a target: make test ARGS="-k fora", make demo ARGS="--help".

PYTHON ?= python3
ARGS ?=
SHELL := /bin/sh
.DEFAULT_GOAL := help

run := .venv/bin/python
workers := -n auto --maxprocesses 8 --dist worksteal
setup = @$(PYTHON) scripts/setup_venv.py

.PHONY: help demo test test-all check format compat bundled bench docs venv clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo:  ## draw with and without caching, measure, write one page to look at
	$(setup) eval
	@.venv/bin/dittocache demo $(ARGS)

test:  ## the tests that take seconds
	$(setup) dev eval train tune
	@$(run) -m pytest -m "not slow" $(workers) $(ARGS)

test-all:  ## every test
	$(setup) dev eval train tune ray quantise
	@$(run) -m pytest $(workers) $(ARGS)

check:  ## lint, formatting, types
	$(setup) dev eval tune
	@$(run) -m ruff check .
	@$(run) -m ruff format --check .
	@$(run) -m mypy

format:  ## put the code into shape
	$(setup) dev
	@$(run) -m ruff check --fix-only --quiet .
	@$(run) -m ruff format .

compat:  ## measure every method on every model and write the table
	$(setup) dev eval train
	@$(run) tests/matrix.py --write

bundled:  ## rebuild a bundled model, its data and its statistics from scratch
	$(setup) build eval
	@$(run) -m dittocache.bundled.build $(ARGS)

bench:  ## measure speed against the uncached model and against other libraries
	$(setup) bench
	@$(run) benchmarks/speed.py $(ARGS)

docs:  ## build the documentation into site/
	$(setup) docs
	@$(run) -m mkdocs build --strict $(ARGS)

venv:  ## only set up .venv for development
	$(setup) dev eval train tune

clean:  ## remove caches and what was built
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	@rm -rf .venv

# Three commands on a fresh machine with Python 3.11 or newer:
#   make demo    real images to noise and back, edited, measured, drawn (demo/)
#   make bench   measure how well samplers run backwards, about a minute, and report (bench/, report/report.html)
#   make test    lint, types and tests
# Others: make test-slow, make docs, make clean; and to run everything in other surroundings, an hour or so each:
#   make test-threads    the tests with torch's default threads
#   make test-oldest     the tests with the oldest versions that are allowed, make test-newest with the newest
#   make package      the wheel and the sdist, in dist/, and whether a package index takes them
#   make fuzz MINUTES=10    random runs, files and command lines
#   make mutants COUNT=100  faults in the package, one at a time: which of them no test notices
#   make environments    the same calls in torch's modes, with other layouts and threads (docs/environments.md)
#
# The default is the torch build that CI uses, on the CPU. With a GPU: make demo TORCH='torch>=2.4'

PYTHON ?= python3
TORCH ?= torch==2.13.0
MINUTES ?= 10
COUNT ?= 100
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo bench test test-slow test-threads test-oldest test-newest package fuzz mutants environments lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/cli
	$(BIN)/kinvert demo --out demo
	@echo 'The command is $(BIN)/kinvert; . $(BIN)/activate puts it on the path.'

bench: $(VENV)/cli
	$(BIN)/kinvert bench --preset quick --workers 2 --out bench
	$(BIN)/kinvert bench report bench --out report

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -q -m slow

test-threads: $(VENV)/dev
	env -u OMP_NUM_THREADS KINVERT_TEST_THREADS=0 $(BIN)/python -m pytest -q

test-oldest:
	$(PYTHON) tests/versions.py oldest

test-newest:
	$(PYTHON) tests/versions.py newest

package: $(VENV)/dev
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist
	$(BIN)/twine check --strict dist/*

fuzz: $(VENV)/dev
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

mutants: $(VENV)/dev
	$(BIN)/python tests/mutants.py --count $(COUNT) --workers 2

environments: $(VENV)/dev
	$(BIN)/python benchmarks/environments.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kinvert needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q '$(TORCH)'
	touch $@

$(VENV)/%: $(VENV)/torch pyproject.toml
	$(BIN)/pip install -q -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest-* .venv-newest-* demo bench report site dist

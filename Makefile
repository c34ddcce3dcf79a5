# Three commands on a fresh machine with Python 3.11 or newer:
#   make demo    unsample real images, sample them back, measure, draw (demo/)
#   make bench   measure how well samplers run backwards, about a minute, and report (bench/, report/report.html)
#   make test    lint, types and tests
# Others: make test-slow, make docs, make clean.
#
# The default is the torch build that CI uses, on the CPU. With a GPU: make demo TORCH='torch>=2.4'

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo bench test test-slow lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/cli
	$(BIN)/kinvert demo --out demo

bench: $(VENV)/cli
	$(BIN)/kinvert bench --preset quick --workers 2 --out bench
	$(BIN)/kinvert bench report bench --out report

test: lint
	$(BIN)/python -m pytest -q -n 2

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -q -m slow

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
	rm -rf $(VENV) demo bench report site

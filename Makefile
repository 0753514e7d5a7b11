# `make help` lists the targets. Set-up is part of each: it runs once, and again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
ARGS ?=
VENV := .venv
VENV4 := .venv-transformers4
BIN := $(VENV)/bin
TRANSFORMERS4 := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
# The tests are many and small: one thread each, two processes.
PYTEST := -m pytest -n 2 --dist worksteal
export OMP_NUM_THREADS ?= 1
.DEFAULT_GOAL := help
.PHONY: help run test test-gpu test-transformers4 lint format types docs startup clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | awk -F'\t' '{ printf "  make %-20s %s\n", $$1, $$2 }'

run: $(VENV)/installed ## the main job, moefactory check: the block beside Hugging Face's and float64
	@$(BIN)/moefactory check

test: $(VENV)/installed ## all tests that need no GPU; ARGS="-k routing" goes to pytest
	$(BIN)/python $(PYTEST) $(ARGS)

test-gpu: ## the same cases compiled, on a GPU; installs nothing and uses PYTHON as it is
	MOEFACTORY_TEST_GPU=1 $(PYTHON) -m pytest -p no:benchmark $(ARGS)

test-transformers4: $(VENV4)/installed ## the weight-layout tests against the last transformers 4
	$(VENV4)/bin/python $(PYTEST) tests/test_weights_live.py tests/test_weights_checkpoint.py $(ARGS)

lint: $(VENV)/installed ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed ## let ruff format and repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/installed ## mypy
	$(BIN)/mypy

docs: $(VENV)/installed ## write the README's generated tables anew
	$(BIN)/python tools/readme.py

startup: $(VENV)/installed ## measure import, composition, build and check into benchmarks/results/startup.json
	$(BIN)/python benchmarks/startup.py

clean: ## remove both environments and the caches
	rm -rf $(VENV) $(VENV4) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Some systems ship a Python whose venv lacks pip: then the pip of that Python brings one.
define create
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	|| { echo "make: needs Python 3.11 to 3.13, not $$($(PYTHON) --version 2>&1); name one: make PYTHON=python3.12"; exit 1; }
@echo "make: installing into $(1), a few minutes the first time"
@$(PYTHON) -m venv $(1) >/dev/null 2>&1 \
	|| { $(PYTHON) -m venv --clear --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install --quiet pip; }
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(call create,$(VENV))
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV4)/installed: pyproject.toml constraints.txt Makefile
	$(call create,$(VENV4))
	@grep -v -i -E '^(transformers|huggingface.hub|tokenizers)==' constraints.txt > $(VENV4)/constraints.txt
	@$(VENV4)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV4)/constraints.txt -e '.[test]' $(TRANSFORMERS4)
	@touch $@

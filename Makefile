PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo gpu test test-numpy2 lint docs install

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install  ## alanine dipeptide with fixed and with learned swaps: a table, a picture and two flows in out/: 10 minutes on two cores
	$(BIN)/python -m benchmarks demo

gpu: install  ## the benchmarks cost, step and wide on a GPU, if torch sees one: about two hours
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		for name in cost step wide; do $(BIN)/python -m benchmarks $$name --device cuda || exit 1; done; \
	else \
		echo "make gpu: nothing was run, since torch sees no GPU here"; \
	fi

test: install  ## all tests and doctests: 10 minutes on two cores
	$(BIN)/python -m pytest -n auto

test-numpy2: .venv-numpy2/installed  ## the tests of the plug-ins in a second environment, with NumPy 2, sbi, glasflow, nessai: 3 minutes
	.venv-numpy2/bin/python -m pytest -n auto tests/plugins tests/docs

lint: install  ## style, by ruff, types, by mypy, and the directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

docs: .venv/docs  ## the site of docs/, with reference and notebooks, in docs/_build/html: a minute
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

install: .venv/installed  ## .venv, with all that the others need; they make it themselves

.venv/installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# The pins of the first environment hold here too, but for NumPy's.
.venv-numpy2/installed: setup.cfg setup.py pyproject.toml constraints.txt constraints-numpy2.txt
	$(PYTHON) -m venv .venv-numpy2
	grep -v '^numpy=' constraints.txt > .venv-numpy2/constraints.txt
	.venv-numpy2/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-numpy2/constraints.txt -c constraints-numpy2.txt -e '.[dev-numpy2]'
	touch $@

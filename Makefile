PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs install

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z_-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install  ## alanine dipeptide with fixed and with learned swaps: a table, a picture and two flows in out/: 10 minutes on two cores
	$(BIN)/python -m benchmarks demo

test: install  ## all tests and doctests: 10 minutes on two cores
	$(BIN)/python -m pytest -n auto

lint: install  ## style, by ruff, and the directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

docs: .venv/docs  ## the site of docs/, with reference and notebooks, in docs/_build/html: a minute
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

install: .venv/installed  ## .venv, with all that the others need; they make it themselves

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

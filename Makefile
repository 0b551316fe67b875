PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint install

demo: install  ## alanine dipeptide with fixed and with learned swaps: a table and a picture
	$(BIN)/python -m benchmarks demo

test: install
	$(BIN)/python -m pytest -n auto

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

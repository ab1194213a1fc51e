# Two commands: `make demo` and `make test`. Both make .venv and install what tests ran with.
PYTHON ?= python3.11
BIN := .venv/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

.PHONY: demo test install lint types clean

.venv/made: pyproject.toml constraints.txt $(PLUGINS:%=%/pyproject.toml)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev]' $(PLUGINS:%=--editable %)
	touch $@

install: .venv/made

demo: install
	$(BIN)/reasonrl train examples/got_r1_nano.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

test: install lint types
	$(BIN)/python -m pytest -q

clean:
	rm -rf .venv build dist runs

# Two commands: `make demo` and `make test`. Both make .venv and install what tests ran with.
PYTHON ?= python3.11
BIN := .venv/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

.PHONY: demo demo-diffusion nano-flow test install lint types clean

.venv/made: pyproject.toml constraints.txt $(PLUGINS:%=%/pyproject.toml)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev]' $(PLUGINS:%=--editable %)
	touch $@

install: .venv/made

demo: install
	$(BIN)/reasonrl train examples/got_r1_nano.py

demo-diffusion: install
	$(BIN)/reasonrl train examples/got_r1_diffusion_nano.py

# Trains the packaged diffusion model of the drawn world again, from scratch, into build/: about ten minutes.
nano-flow: install
	$(BIN)/python examples/nano_flow.py --out build/nano_flow/first
	$(BIN)/python examples/nano_flow.py --out build/nano_flow/second --start build/nano_flow/first \
		--learning-rate 1.5e-3 --seed 1
	$(BIN)/python examples/nano_flow.py --out build/nano_flow/last --start build/nano_flow/second \
		--steps 400 --learning-rate 1e-3 --seed 2 --faulty 0.4

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# Two workers of one thread each; those that start Ray are alone.
test: install lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore=plugins/reasonrl-ray
	$(BIN)/python -m pytest -q plugins/reasonrl-ray

clean:
	rm -rf .venv build dist runs

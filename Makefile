# `make demo` and `make test` set up what they need; `make check` has the linters and the types.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= jobs/align-embedded-cpu.yaml
RUN ?= runs/demo
OVERRIDES ?=

.PHONY: setup demo test check

setup: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/speechalign align $(DEMO) run_dir=$(RUN) $(OVERRIDES)

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/unit tests/contract
	$(BIN)/python -m pytest --ignore tests/unit --ignore tests/contract

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell speechalign jobs clusters tests docs README.md

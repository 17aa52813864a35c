# make demo: train, interrupt, resume and export a small model on this machine's own text
# make test: lint, types and tests.   make test-all: the slow tests too
# make docs: README and docs/ as a site in build/site
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-all docs lint format clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/flame demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# a process of tests for each core; a file's tests stay together
PARALLEL := -n auto --maxprocesses 8 --dist loadfile

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build src/*.egg-info

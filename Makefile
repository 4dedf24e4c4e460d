# Each target makes its own virtual environment when there is none.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

SLOW_OPTIONS ?= --timeout 1800

.PHONY: demo test test-clients test-clients-slow test-slow lint bench clean
.DEFAULT_GOAL := test

# What the demo and the examples need; the rest of it is for tests.
$(VENV)/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed: $(VENV)/.core
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

.types: pyproject.toml
	mkdir -p .types/caesura
	for p in lang runtime scheduler; do ln -sfn ../../$$p .types/caesura/$$p; done
	touch .types

demo: $(VENV)/.core
	$(BIN)/caesura demo

# Files side by side: most of a test's time goes into waiting for processes, or into one thread of Python.
test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --nbmake --nbmake-timeout 240 tests examples/notebooks

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow $(SLOW_OPTIONS)

# Other people's libraries against a real server, each in its locked environment; the second needs 1 GB more.
test-clients: $(VENV)/.installed
	$(BIN)/python -m tests.clients.run

test-clients-slow: $(VENV)/.installed
	$(BIN)/python -m tests.clients.run --slow

lint: $(VENV)/.installed .types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p caesura
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks all

clean:
	rm -rf $(VENV) .venv-clients .venv-peers .types build dist *.egg-info

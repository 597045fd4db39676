# Everything one does here is a target; `make` alone lists them.
#
# The environment in .venv is made once and again when pyproject.toml or constraints.txt change.
# Another interpreter: make PYTHON=/path/to/python3.12 test. Arguments: make test ARGS='-k layout'.

VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
INSTALLED := $(VENV)/.installed

# The first Python that is new enough; looked for only when the environment must be made.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

PIP := $(BIN)/python -m pip install --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test planted planted-time test-system test-backends test-servers test-pythons check format lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO) ## the main job: a real model server under load, and where its time went
	@$(BIN)/python -m stagescope demo $(ARGS)

test: $(INSTALLED) ## the whole test suite
	$(BIN)/python -m pytest $(ARGS)

planted-time: $(INSTALLED) ## servers whose times are known, at four loads: what the report makes of them; five minutes a loop
	$(BIN)/python -m tests.planted_time $(ARGS)

planted: $(INSTALLED) ## servers with one planted bottleneck each: what the verdict makes of them; half an hour on a quiet machine
	$(BIN)/python -m tests.planted $(ARGS)

test-system: $(INSTALLED) ## tests with programs that pip does not install (a real Prometheus)
	$(BIN)/python -m pytest -m system $(ARGS)

test-backends: $(INSTALLED) ## tests with a real Jaeger, built with Go; the first time takes some minutes
	bash scripts/test-backends $(ARGS)

test-servers: $(INSTALLED) ## tests of real model servers, each in an environment of its own; ARGS=NAME for one
	bash scripts/test-servers $(ARGS)

test-pythons: ## the core suites on Python 3.12 and 3.13, where they are found; ARGS=VERSION for one
	bash scripts/test-pythons $(ARGS)

check: $(INSTALLED) ## format, lint, types, layers, and the built wheel in an empty environment
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy --strict $(wildcard src tests benchmarks)
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	bash scripts/check-wheel $(BIN)/python

format: $(INSTALLED) ## mend what can be mended by itself: layout and import order
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

lock: ## resolve anew and rewrite constraints.txt
	bash scripts/lock $(PYTHON)

clean: ## remove the environment and everything built or cached; run folders stay
	rm -rf $(VENV) .venv-servers .venv-pythons build dist src/*.egg-info .coverage* \
		.mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What the demo needs, and no more: some 550 MB, no torch, no linters.
$(DEMO): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "stagescope needs Python 3.11 or newer, and none is on PATH:" \
		"install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON); the first time takes a minute."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --quiet pip setuptools
	$(PIP) --quiet --no-build-isolation --editable '.[demo]'
	@touch $@

# torch comes first and alone: where its small CPU build is on offer, only the exact pin finds it,
# and what is installed later is then content with it.
$(INSTALLED): $(DEMO)
	@echo "Adding torch and the tools of development; the first time takes some minutes."
	$(PIP) --quiet $(TORCH)
	$(PIP) --quiet --group dev
	@touch $@

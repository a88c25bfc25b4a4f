# Wraps the plain commands that the README shows. `make repro` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: venv repro check lint test clean repository

# The stamp is newer than the requirements once they are installed; a broken installation leaves none. It holds the
# folder that it was made in: the commands of an environment that was moved do not start, so that one is made anew.
venv: $(VENV)/.installed

MOVED := $(filter-out $(CURDIR),$(shell cat $(VENV)/.installed 2>/dev/null))
ifneq ($(MOVED),)
.PHONY: $(VENV)/.installed
endif

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed, this is " + sys.version.split()[0] + "; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(if $(MOVED),--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	echo $(CURDIR) > $@

# What a ZIP download lacks.
repository:
	@test -e .git || { echo "DVC works in a git repository, and this folder is none: run \`git init\` first." >&2; exit 1; }

repro: repository venv
	dvc repro

lint: venv
	ruff check .
	ruff format --check .
	mypy

# What needs no model and hardly a process: the quick answer while one works.
QUICK := tests/common tests/config/test_params.py tests/prepare/test_split.py tests/prepare/test_tables.py tests/records \
	tests/sharding/test_layout.py tests/tokenize/test_batches.py

check: lint
	python -m pytest -n 2 --dist loadgroup --quiet $(QUICK)

test: lint
	python -m pytest -n 2 --dist loadgroup

clean:
	rm -rf scratch .mypy_cache .pytest_cache .ruff_cache .hypothesis

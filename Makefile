# Wraps the plain commands that the README shows. `make repro` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: venv repro test clean

# The stamp is newer than the requirements once they are installed; a broken installation leaves none.
venv: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed, this is " + sys.version.split()[0] + "; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

repro: venv
	dvc repro

test: venv
	ruff check .
	ruff format --check .
	python -m pytest -n 2 --dist loadgroup

clean:
	rm -rf scratch .pytest_cache .ruff_cache .hypothesis

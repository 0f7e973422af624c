# Two commands do everything on a fresh machine with Python 3.10 to 3.14 and make:
#   make demo    creates .venv, then trains, measures and shows a small model on this machine (zhibei quickstart)
#   make test    creates .venv, then checks style, types and every test
# The second call of either takes what the first one installed; a changed lock file is installed anew.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo test lint lock

# The first interpreter that really runs (a shim may not) and is recent enough.
FIND_PYTHON = for name in $${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do \
	if "$$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; \
	then echo "$$name"; exit 0; fi; done; \
	echo "No Python 3.10 to 3.14 with venv was found. Install one (Debian: apt-get install python3-venv)," \
	"or say which: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 2
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile

.venv/bin/python:
	@python=$$($(FIND_PYTHON))
	echo "Creating .venv with $$("$$python" --version) ..."
	"$$python" -m venv .venv

.venv/.installed: .venv/bin/python requirements.lock pyproject.toml
	@echo "Installing the pinned packages of requirements.lock (torch is the large one; only the first time) ..."
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.lock
	@echo "Installing the test tools of requirements-dev.lock ..."
	$(PIP) -r requirements-dev.lock
	touch $@

demo: .venv/.installed
	@.venv/bin/zhibei quickstart

lint: .venv/.installed-dev
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

# One thread per test process: torch's own threads would only fight for the same cores.
test: lint
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false .venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# Made again by hand when pyproject.toml changes: scripts/lock.py resolves for each Python and merges the answers.
lock:
	@python=$$($(FIND_PYTHON))
	"$$python" scripts/lock.py

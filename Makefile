# Each target works alone on a fresh clone. Everything is installed into .venv/.
#   make demo                   the whole study on the embedded sandbox, offline, on a CPU
#   make test | check | docs    what CI runs
#   make setup TORCH_INDEX=URL  take torch from another package index (CPU-only or another CUDA)
.PHONY: setup demo test check docs clean
.DELETE_ON_ERROR:

PYTHON ?= $(shell if python3.11 -c pass >/dev/null 2>&1; then echo python3.11; else echo python3; fi)
PYTEST_WORKERS ?= 2
TORCH_INDEX ?=
DEMO_OUT ?= demo-out

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet \
	$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -c constraints.txt
INPUTS := pyproject.toml constraints.txt

setup: .venv/.stamp-dev

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Palimpsest needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
	    "$$($(PYTHON) --version 2>&1 || true). Install one, or run: make setup PYTHON=/path/to/python"; \
	  exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  v=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  echo "'$(PYTHON)' cannot make virtual environments (Debian and Ubuntu ship that apart)." \
	    "Install it with: sudo apt install python$$v-venv"; \
	  exit 1; }
	$(PYTHON) -m venv .venv

# What running needs (make demo), and what developing needs on top (make setup, test, check).
.venv/.stamp-runtime: .venv/pyvenv.cfg $(INPUTS)
	@echo "installing Palimpsest into .venv (torch is large: this can take minutes)"
	$(PIP_INSTALL) -e .
	@touch $@

.venv/.stamp-dev: .venv/pyvenv.cfg $(INPUTS)
	@echo "installing Palimpsest and its development tools into .venv (torch is large: this can take minutes)"
	$(PIP_INSTALL) -e '.[dev]'
	@touch .venv/.stamp-runtime $@

demo: .venv/.stamp-runtime
	$(BIN)/palimpsest demo --out $(DEMO_OUT)

test: .venv/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

check: .venv/.stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

.venv/.stamp-docs: .venv/.stamp-dev
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

docs: .venv/.stamp-docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

clean:
	rm -rf .venv build dist site demo-out .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

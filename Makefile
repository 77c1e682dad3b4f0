# From a fresh clone, with Python >= 3.11, git and make: `make demo`, `make test`, `make lab`.

.DEFAULT_GOAL := help
.PHONY: help install demo test lab bench check format browser clean

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BROWSER := $(VENV)/.browser
OUT := out
QUICKSTART := notebooks/tutorials/01_quickstart.ipynb
ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)

# The first interpreter that is new enough and can make a virtual environment.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# Files are dealt out in the order of tests/conftest.py, each to one worker: what a file shares is made once.
WORKERS := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

export JUPYTER_PREFER_ENV_PATH := 1

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED)  ## a virtual environment with everything, in .venv

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv and pip was found. Name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): PyTorch is large, this takes a few minutes ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## train, prune, quantize and compare: runs the quickstart notebook
	@mkdir -p $(OUT)/demo
	@echo "Running $(QUICKSTART), about a minute ..."
	@WORKBENCH_RUNS="$(CURDIR)/$(OUT)/demo/runs" $(BIN)/papermill --no-progress-bar --log-level WARNING --cwd $(OUT)/demo \
		-p report comparison.html $(QUICKSTART) $(OUT)/demo/01_quickstart.ipynb 2>$(OUT)/demo/log.txt || { cat $(OUT)/demo/log.txt; exit 1; }
	@$(BIN)/python -c "import nbformat; cell = nbformat.read('$(OUT)/demo/01_quickstart.ipynb', 4).cells[-1]; \
		print(*(o.text for o in cell.outputs if o.output_type == 'stream'), sep='', end='')"
	@echo "The executed notebook: $(OUT)/demo/01_quickstart.ipynb"

# The first tutorial is run by tests/notebooks, as a file.
test: $(INSTALLED) $(BROWSER)  ## every test, then the tutorial notebooks and the panels in a browser
	$(BIN)/python -m pytest -m "not ui" $(WORKERS)
	WORKBENCH_RUNS="$(CURDIR)/$(OUT)/test/runs" $(BIN)/python -m pytest $(WORKERS) --ignore $(QUICKSTART) \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=300 --timeout=600 notebooks/tutorials tests/ui

browser: $(BROWSER)

# The tests of the panels drive a real browser; where there is none and none can be had, they are skipped and say so.
$(BROWSER): $(INSTALLED)
	@found() { for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && return; done; return 1; }; \
	found || { test -n "$(ROOT_FLAG)" && command -v apt-get >/dev/null && \
		{ apt-get update && apt-get install -y --no-install-recommends chromium fonts-liberation; } >/dev/null 2>&1; }; \
	found || timeout 300 $(BIN)/playwright install chromium >/dev/null 2>&1 || \
		echo "No browser could be installed: the browser tests will be skipped."
	@touch $@

lab: $(INSTALLED)  ## JupyterLab at the quickstart
	WORKBENCH_RUNS="$(CURDIR)/runs" $(BIN)/jupyter lab $(ROOT_FLAG) $(QUICKSTART)

bench: $(INSTALLED)  ## the benchmarks of tests/bench, beside their peers
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@for file in tests/bench/[!_]*.py; do echo "== $$file"; $(BIN)/python -m tests.bench.$$(basename $$file .py) || exit 1; done

check: $(INSTALLED)  ## format, lint, types, and no outputs in notebooks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy workbench widgets
	find notebooks -name '*.ipynb' -not -path '*/.*' -exec $(BIN)/nbstripout --verify {} +

format: $(INSTALLED)  ## put the code and the notebooks in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	find notebooks -name '*.ipynb' -not -path '*/.*' -exec $(BIN)/nbstripout {} +

clean:  ## remove what was built, the virtual environment included
	rm -rf $(VENV) $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache

# What developers and CI run. Everything happens in .venv, which `make install` builds when it is missing or outdated.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
DAYS ?= 4
DATA ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
SOURCES := features monitoring models components pipelines benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long check format bench clean

help: ## Show this help
	@echo "OneRec platform. The targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON (a Python 3.11), DAYS (of the demo), DATA (real logs for the demo), ARGS (more for pytest)"

install: $(STAMP) ## Build .venv with everything pinned in constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null || { \
	    echo "error: Python 3.11 is needed, found: $$($(PYTHON) --version 2>&1 || echo none)"; \
	    echo "hint: install it, then: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }; \
	  $(PYTHON) -m venv --clear .venv || { \
	    echo "error: $(PYTHON) cannot make a virtual environment"; \
	    echo "hint: install its venv module (Debian: apt install python3.11-venv), or give another PYTHON=..."; exit 1; }; fi
	@echo "installing into .venv (some minutes the first time) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[local,dev]' \
	  > .venv/install.log 2>&1 & pid=$$!; seconds=0; trap 'kill $$pid; exit 130' INT TERM; \
	  while kill -0 $$pid 2>/dev/null; do \
	    sleep 1; seconds=$$((seconds + 1)); \
	    if [ $$((seconds % 10)) -eq 0 ]; then \
	      printf '  %3d s  %3d packages  %s\n' $$seconds $$(grep -cE '^(Collecting|Processing) ' .venv/install.log) \
	        "$$(tail -n 1 .venv/install.log | cut -c 1-80)"; fi; \
	  done; \
	  wait $$pid || { echo "error: the installation failed; the end of .venv/install.log:"; \
	    tail -n 20 .venv/install.log; exit 1; }; \
	  echo "installed in $$seconds s"
	@touch $@

demo: install ## Play the whole loop for DAYS simulated days, on DATA when given, and write a report
	@$(BIN)/onerec loop --fresh --days $(DAYS) $(if $(DATA),--data '$(DATA)')

test: install ## Run the tests
	@$(BIN)/python -m pytest $(ARGS)

test-long: install ## Run the long tests: kills, soaks, fuzzing
	@$(BIN)/python -m pytest -m long --timeout 1800 $(ARGS)

check: install ## Check style, types and layers
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: install ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

bench: install ## Run every benchmark in its quick form
	@for file in $$(grep -l __main__ benchmarks/[a-z]*.py); do name=$$(basename $$file .py); \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

clean: ## Stop the local services; remove .venv, caches and .onerec with all its data
	@if [ -x $(BIN)/onerec ]; then $(BIN)/onerec down; fi
	@rm -rf .venv .onerec .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

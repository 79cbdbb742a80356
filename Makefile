# make demo    install into .venv, write with ddlm-small, train ddlm-tiny for BUDGET seconds, measure, plot
# make test    install everything the tests import, run them
# Only Python 3.11+ and make are needed. Nothing is installed twice: see the stamp files.

PYTHON ?= python3
BUDGET ?= 240
# What the demo draws its plots with; `make setup EXTRAS=serve,plots` chooses others.
EXTRAS ?= plots
DEV_EXTRAS = data,eval,glue,serve,track,plots,docs,dev
# Two workers of one thread each: more threads than cores make small models many times slower.
WORKERS ?= 2
# Further arguments of pytest, as in: make test ARGS="tests/diffusion -k warp"
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
VENV = .venv
BIN = $(VENV)/bin
# It names the extras: others are another installation.
STAMP = $(VENV)/.stamp.$(EXTRAS)

.PHONY: help setup setup-dev demo test lint lint-style lint-types lint-imports format docs clean distclean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP) ## install ddlm into .venv
	@:
setup-dev: $(VENV)/.stamp-dev ## install ddlm with every extra, the tests' and the linters' tools
	@:

# make compares dates: a stamp older than these files means that they changed since the installation.
$(STAMP): pyproject.toml constraints.txt
	$(call install,$(EXTRAS))
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt
	$(call install,$(DEV_EXTRAS))
	@touch $(STAMP) $@

define install
	@command -v $(PYTHON) >/dev/null || { echo "ddlm needs Python 3.11 or newer, and '$(PYTHON)' was not found: install it or run make PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ddlm needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1): run make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' lacks the venv module: install it (Debian: apt install python3-venv) or run make PYTHON=/path/to/another"; exit 2; }
	@echo "installing ddlm$(if $(1),[$(1)]) into $(VENV) (once; torch is the largest part)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.$(if $(1),[$(1)])'
endef

demo: setup ## write with ddlm-small, train ddlm-tiny further for BUDGET seconds (240), measure, plot
	@$(BIN)/ddlm demo --budget $(BUDGET)

test: setup-dev ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: lint-style lint-types lint-imports ## ruff, mypy and the import contracts (-k: all, even after a failure)
lint-style: setup-dev
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
lint-types: setup-dev
	$(BIN)/mypy
lint-imports: setup-dev
	$(BIN)/lint-imports --no-logo

format: setup-dev ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup-dev ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove what builds and tools leave behind; runs and .venv stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)

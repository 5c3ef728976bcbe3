# Headrace: `make up` on a fresh machine needs Python 3.11+, make and pip's package registry. No more.

SHELL := /bin/bash -o pipefail
VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := $(wildcard workers/model/native/*.cpp workers/model/native/*.h)
ARGS  ?=

# The first Python that is new enough; `make install PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	command -v $$p >/dev/null 2>&1 \
	&& $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$p && break; done)

PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	--log $(VENV)/install.log -c constraints.txt -e '.[worker,embedded,dev]'
# At a terminal: what pip does at this moment, always on the same line, and its errors.
ONE_LINE = awk '/^ *ERROR/ { printf "\r\033[K"; print > "/dev/stderr" } \
	/^ *(Collecting|Downloading|Using|Installing|Building|Preparing) / { \
	printf "\r\033[K  %.100s", $$1 " " $$2; fflush() } END { printf "\r\033[K" }'

.DEFAULT_GOAL := help
.PHONY: help install native up test check format bench bench-engine bench-gpu chaos constraints clean

help: ## List these targets
	@printf 'Headrace. Targets (options for the command behind a target: ARGS="…"):\n\n'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
		| awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

install: $(STAMP) ## Make .venv with everything in it (a second run costs nothing)

$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	@test -n "$(PYTHON)" || { \
		echo "headrace: needs Python 3.11 or newer; found: $$(python3 --version 2>&1 || echo none)." \
			"Install one, or name it: make install PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "headrace: $(PYTHON) cannot make virtual environments (on Debian: apt install python3-venv)" >&2; \
		exit 1; }
	@echo "headrace: installing into $(VENV), a few minutes the first time"
	@if [ -t 1 ]; then $(PIP_INSTALL) 2>&1 | $(ONE_LINE); else $(PIP_INSTALL) -qq; fi || { \
		echo "headrace: the installation failed; all of it is in $(VENV)/install.log" >&2; exit 1; }
	@touch $@

native: ## Rebuild the engine's kernels only, after a change to their source
	@$(BIN)/python -c 'from setuptools import setup; setup()' -q build_ext --inplace --force
	@touch $(STAMP)

up: $(STAMP) ## Start everything and serve at http://127.0.0.1:8080 (ARGS="--workers 2 --port 9000")
	@exec $(BIN)/headrace up $(ARGS)

test: $(STAMP) ## Run every test (ARGS="tests/story -k resume")
	@$(BIN)/python -m tests.support.models
	@$(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

check: $(STAMP) ## Format, lint, types and import borders, as CI checks them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and fix what the linter can fix
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure the latency that Headrace adds (ARGS="--rate 50 --seconds 30")
	@exec $(BIN)/headrace bench latency $(ARGS)

bench-engine: $(STAMP) ## Measure Headrace beside the servers installed in var/peers, a quarter of an hour
	@$(BIN)/headrace model add SmolLM2-135M-Instruct
	@exec $(BIN)/headrace bench peers --json ops/bench/results/peers.json --readme README.md $(ARGS)

# On a bare GPU machine: its own Python, without our environment; see the command's first lines.
bench-gpu: ## Check and measure the engine on an NVIDIA GPU beside transformers' own batching
	@exec $(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m ops.bench.gpu $(ARGS)

chaos: $(STAMP) ## Kill processes under load and compare every answer (ARGS="--victim gateway --gateways 2")
	@exec $(BIN)/headrace bench chaos $(ARGS)

constraints: $(STAMP) ## Write constraints.txt from what is installed now
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable \
		| sed -E 's/\+[A-Za-z0-9.]+$$//' | tr '[:upper:]' '[:lower:]' | grep -v '^#' | LC_ALL=C sort; \
	} > constraints.txt.new && mv constraints.txt.new constraints.txt

clean: ## Remove the environment and caches; var/ (models, logs, data) stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage* \
		.import_linter_cache workers/model/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

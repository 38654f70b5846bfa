# Everything runs in .venv, which the first target that needs it makes. `make` alone lists targets.
#   make demo ARGS="--nodes 3"        make test ARGS="-k codec"        PYTHON=python3.12 make check

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.ready
ARGS  ?=

export FLWR_TELEMETRY_ENABLED   ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup bench bench-7b bench-control fuzz demo chaos attacks test lint format types contracts check proto clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

$(STAMP): pyproject.toml constraints.txt tools/bootstrap.sh tools/fetch_pip.py
	@sh tools/bootstrap.sh $(VENV)
	@touch $@

setup: $(STAMP) ## make .venv and install talkoot into it, for development
	@:

demo: $(STAMP) ## train a small model on a network of real processes on this machine
	@$(BIN)/talkoot-sim demo $(ARGS)

bench: $(STAMP) ## measure the data path: bits, speed, memory, as ratios (ARGS=--quick: 2 minutes)
	@$(BIN)/python -m bench $(ARGS)

bench-control: $(STAMP) ## put thousands of nodes on one coordinator (ARGS="--nodes 500")
	@$(BIN)/python -m bench.control $(ARGS)

bench-7b: $(STAMP) ## a whole round at 7.0e9 parameters on this machine: needs 76 GB of free disk
	@$(BIN)/python -m bench.round7b $(ARGS)

fuzz: $(STAMP) ## hostile bytes into every parser (ARGS=--quick: a minute)
	@$(BIN)/python -m bench.fuzz $(ARGS)

chaos: $(STAMP) ## kill every process of a real network, again and again (ARGS="--quick")
	@$(BIN)/talkoot-sim chaos $(ARGS)

attacks: $(STAMP) ## set liars of twelve kinds on the real coordinator (ARGS="--quick")
	@$(BIN)/talkoot-sim attacks $(ARGS)

test: $(STAMP) ## run the tests
	@$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP) ## ruff: repair what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP) ## mypy, strict
	@$(BIN)/mypy

contracts: $(STAMP) ## import-linter: who may import whom
	@$(BIN)/lint-imports

check: lint types contracts test ## lint, types, contracts and test, as .ci/run does

proto: $(STAMP) ## generate the gRPC modules from their .proto
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh tools/gen_proto.sh

clean: ## remove what was built and cached; keeps .venv and runs/
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find protocol client server sims tests tools bench -name __pycache__ -type d -prune \
		-exec rm -rf {} + 2>/dev/null || true

# `make run`: environment, install, the whole pipeline. `make test`: the tests. Both need only Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,deepspeed,orchestrate,kubernetes,test,dev
INSTALLED := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

# Nothing is reported to anyone.
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run up install test test-all lint format types clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: install ## install, then the whole pipeline on this machine
	@$(BIN)/phantom run

up: install ## install, then Prefect and MLflow on this machine
	@$(BIN)/phantom up

install: $(INSTALLED) ## the virtual environment, with the tested versions

# Torch first: asked for by its exact version it stays the build that suits this machine.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/installed-*
	@touch $@

test: install ## the tests
	@$(BIN)/python -m pytest -m "not slow"

test-all: install ## the tests, the long ones too
	@$(BIN)/python -m pytest

lint: install ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: install ## let ruff put the style right
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: install ## types alone
	@$(BIN)/mypy

clean: ## remove what runs have made, not the environment
	rm -rf data checkpoints models/phantom models/control reports mlflow.db* mlartifacts .prefect .dvc/tmp .dvc/cache

# `make run`: environment, install, the whole pipeline. `make test`: the tests. Both need only Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --progress-bar off
LOCK := requirements/dev.txt
INSTALLED := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt $(LOCK) | cksum | cut -d' ' -f1)

# Nothing is reported to anyone.
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run up install test test-all axe lint lint-workflows format types docs docs-serve
.PHONY: dist sbom images image-orchestrator image-train image-vbench publish pin-images docker-engine overlays kind lock clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: install ## install, then the whole pipeline on this machine
	@$(BIN)/phantom run

up: install ## install, then Prefect and MLflow on this machine
	@$(BIN)/phantom up

install: $(INSTALLED) ## the virtual environment, with the tested versions

# From the lock, with hashes checked. Torch by version alone, so that pip takes the build that suits this machine.
$(INSTALLED): pyproject.toml constraints.txt $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --require-hashes --requirement $(LOCK)
	$(PIP) --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check > $(VENV)/check.log || { cat $(VENV)/check.log; exit 1; }
	@rm -f $(VENV)/installed-*
	@touch $@

test: install ## the tests
	@$(BIN)/python -m pytest -m "not slow"

test-all: install ## the tests, the long ones too
	@$(BIN)/python -m pytest

AXE := 4.14.1
axe: install ## fetch axe-core from npm, then look at every page with it in Chromium
	@command -v npm > /dev/null || { echo "make axe: npm is not installed" >&2; exit 1; }
	@mkdir -p .axe && cd .axe && npm pack --silent axe-core@$(AXE) > /dev/null && tar -xzf axe-core-$(AXE).tgz
	@$(BIN)/python -m pytest tests/evaluation/test_accessible.py tests/serving/test_studio.py -k axe

lint: install lint-workflows ## style, types, and the files of .github/
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

SCHEMA = $(BIN)/check-jsonschema --quiet --builtin-schema
lint-workflows: install ## check .github/ and CITATION.cff against their schemas
	@$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	@$(SCHEMA) vendor.dependabot .github/dependabot.yml
	@$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	@$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	@$(SCHEMA) vendor.citation-file-format CITATION.cff

format: install ## let ruff put the style right
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: install ## types alone
	@$(BIN)/mypy

docs: install ## the documentation site, in site/
	@$(BIN)/python docs/draw_architecture.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "$(CURDIR)/site/index.html"

docs-serve: install ## the documentation site, rebuilt when a page changes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

dist: install ## wheel and sdist: dist/
	@rm -rf build dist/*.whl dist/*.tar.gz
	@$(BIN)/python -m build --no-isolation --outdir dist . > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@ls dist/*.whl dist/*.tar.gz

sbom: install ## software bill of materials of the environment: dist/sbom.cdx.json
	@mkdir -p dist
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.cdx.json $(BIN)/python
	@echo dist/sbom.cdx.json

VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
COMMIT = $(shell git rev-parse HEAD 2> /dev/null || echo unknown)
REGISTRY ?=
# Stored beside the image, for `docker buildx imagetools inspect`: what it holds, and what it was built from and how.
ATTESTED = --build-arg COMMIT=$(COMMIT) --sbom=true --provenance=mode=max --push
images: image-orchestrator image-train ## both container images; REGISTRY=host/path/ goes before their names

image-orchestrator: docker-engine
	docker build --build-arg COMMIT=$(COMMIT) --tag $(REGISTRY)phantom-orchestrator:$(VERSION) .

image-train: docker-engine
	docker build --build-arg COMMIT=$(COMMIT) --file Dockerfile.train --tag $(REGISTRY)phantom-train:$(VERSION) .

image-vbench: docker-engine ## an image with the official judges of VBench-2.0, without their weights
	docker build --tag vbench2-judges:45e79ec - < Dockerfile.vbench2

publish: docker-engine ## push both images to REGISTRY=host/path/ with SBOM and provenance, and print their digests
	@test -n "$(REGISTRY)" || { echo "make publish: REGISTRY=host/path/ is missing" >&2; exit 1; }
	@mkdir -p dist
	docker buildx build $(ATTESTED) --metadata-file dist/orchestrator.json --tag $(REGISTRY)phantom-orchestrator:$(VERSION) .
	docker buildx build $(ATTESTED) --metadata-file dist/train.json --file Dockerfile.train --tag $(REGISTRY)phantom-train:$(VERSION) .
	@for image in orchestrator train; do \
	  sed -n 's|.*"containerimage.digest": *"\([^"]*\)".*|$(REGISTRY)phantom-'$$image'@\1|p' dist/$$image.json; done

pin-images: ## add the digests that the registries state now to the images of others, in Dockerfiles and k8s/
	@$(PYTHON) requirements/pin_images.py

docker-engine:
	@docker info > /dev/null 2>&1 || { echo "make images: no Docker engine answers" >&2; exit 1; }

overlays: ## check that kubectl builds k8s/base and every overlay
	@command -v kubectl > /dev/null || { echo "make overlays: kubectl is not installed" >&2; exit 1; }
	@for folder in k8s/base k8s/overlays/*; do kubectl kustomize $$folder > /dev/null && echo $$folder || exit 1; done

kind: install ## check k8s/ on a kind cluster with the training operator; needs kind and `make image-orchestrator`
	@.ci/kind

lock: ## update constraints.txt and requirements/ from pyproject.toml; UV="--upgrade-package NAME" for a newer version
	@test -x $(BIN)/uv || { echo "make lock: run make install first" >&2; exit 1; }
	@$(BIN)/python requirements/lock.py $(UV)

clean: ## remove what runs have made, not the environment
	rm -rf data checkpoints models/phantom models/control models/lora models/alignment reports mlflow.db* mlartifacts .prefect .dvc/tmp .dvc/cache build dist site

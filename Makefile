# What developers and CI run. Everything happens in .venv, which `make install` builds when it is missing or outdated.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
DAYS ?= 4
DATA ?=
ARGS ?=
WORKERS ?= 2
ENGINE ?= docker
REGISTRY ?= ghcr.io/onerec-platform
TORCH ?= cpu
IMAGES ?= $(if $(filter cuda,$(TORCH)),serve train,pipelines serve train)
TORCH_INDEX ?= $(if $(filter cuda,$(TORCH)),https://pypi.org/simple,https://download.pytorch.org/whl/cpu)
TAG ?= $(VERSION)$(if $(filter cuda,$(TORCH)),-cuda)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

BIN := .venv/bin
STAMP := .venv/.installed
BENCHES := alignment cost decoding equal_loss etl flops intake lifelong loop operations rollouts scaling serving session training
BENCHES_OF_LOGS := pscore quality quality_rl tokenizer
SOURCES := features monitoring models components pipelines benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help install demo promtool test test-long test-cluster images sbom test-images chart check format bench clean

help: ## Show this help
	@echo "OneRec platform. The targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON (a Python 3.11), DAYS (of the demo), DATA (real logs for demo and bench), ARGS (more for pytest), WORKERS (of the tests)"

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

promtool: install ## Take promtool, which tests the alert rules, from Debian's package prometheus
	@if [ -x $(BIN)/promtool ] || command -v promtool > /dev/null; then exit 0; fi; \
	folder=$$(mktemp -d); \
	if (cd $$folder && { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } && \
	  dpkg-deb --fsys-tarfile prometheus_*.deb | tar x ./usr/bin/promtool) > $$folder/log 2>&1; \
	then mv $$folder/usr/bin/promtool $(BIN)/promtool; \
	else echo "note: no promtool from Debian's packages; tests of alert rules are skipped until one is in the PATH"; fi; \
	rm -rf $$folder

test: install promtool ## Run the tests, in WORKERS processes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-long: install ## Run the long tests: kills, soaks, fuzzing
	@$(BIN)/python -m pytest -m long --timeout 1800 $(ARGS)

test-cluster: install ## Run the tests of RayJobs and canaries on the cluster that KUBECONFIG names (CRDs of KubeRay and KServe)
	@test -n "$$KUBECONFIG" || { echo "error: KUBECONFIG is not set"; \
	  echo "hint: KUBECONFIG=~/.kube/config make test-cluster; each test makes a namespace and deletes it"; exit 1; }
	@$(BIN)/python -m pytest -m cluster tests/models/cluster $(ARGS)

images: ## Build the images with ENGINE (docker, podman, buildah); TORCH=cuda for GPUs, BASE by digest, REGISTRY
	@for target in $(IMAGES); do \
	  $(ENGINE) build --target $$target --tag $(REGISTRY)/onerec-$$target:$(TAG) --build-arg VERSION=$(VERSION) \
	    --build-arg REVISION=$$(git rev-parse HEAD 2> /dev/null || echo unknown) \
	    --build-arg TORCH_INDEX=$(TORCH_INDEX) $(if $(BASE),--build-arg BASE=$(BASE)) . || exit 1; done

sbom: ## Copy each image's bill of materials (CycloneDX) to build/sbom; ENGINE docker or podman
	@mkdir -p build/sbom; for target in $(IMAGES); do \
	  $(ENGINE) run --rm --network none --entrypoint cat $(REGISTRY)/onerec-$$target:$(TAG) \
	    /opt/sbom.cdx.json > build/sbom/onerec-$$target-$(TAG).cdx.json || exit 1; done; ls build/sbom

test-images: install ## Build the images without an engine and run them (root; apt: buildah, debootstrap; ONEREC_IMAGES="serve train")
	@$(BIN)/python -m pytest -m images tests/images $(ARGS)

chart: install ## Write the Helm chart's README; check the chart and the manifests
	@$(BIN)/python tests/support/chart/readme.py
	@$(BIN)/python -m pytest tests/helm tests/manifests tests/support $(ARGS)

check: install ## Check style, types and layers, and the chart
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest tests/helm tests/manifests tests/support $(ARGS)

format: install ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

bench: install ## Run every benchmark in its quick form; those of a real log with DATA, a folder of KuaiRand
	@for name in $(BENCHES); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick || exit 1; done
	@for name in $(BENCHES_OF_LOGS); do \
	  if [ -z '$(DATA)' ]; then echo "== $$name: not run, it wants DATA=folder"; continue; fi; \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick --data '$(DATA)' || exit 1; done

clean: ## Stop the local services; remove .venv, caches and .onerec with all its data
	@if [ -x $(BIN)/onerec ]; then $(BIN)/onerec down; fi
	@rm -rf .venv .onerec .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

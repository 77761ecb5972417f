# Everything that a person types. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP)  ## install everything into .venv, as locked
$(STAMP): pyproject.toml requirements.lock requirements-bootstrap.lock
	@echo "  environment  installing $$(grep -cE '^[a-z]' requirements.lock) locked packages into .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: -r requirements-bootstrap.lock
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: venv  ## data, a small base model and a fine-tuning run, on this machine
	@$(BIN)/python examples/make_dataset.py
	@$(BIN)/python examples/make_base.py
	@$(BIN)/hone run examples/quickstart.yaml

test: venv  ## all tests
	tools/test.sh

check: venv  ## format, lint, types, layers, protos, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy service/hone trainer_image/hone_trainer
	$(BIN)/lint-imports
	$(BIN)/buf lint
	tools/generated.sh --check

SOAK_MINUTES ?= 30
SOAK_SEED ?=
soak: venv  ## what takes long, here and on the cluster; then the service killed at random points for SOAK_MINUTES, by SOAK_SEED
	SOAK_SEED=$(SOAK_SEED) $(BIN)/python -m pytest -n 0 -m slow tests
	SOAK_MINUTES=$(SOAK_MINUTES) SOAK_SEED=$(SOAK_SEED) $(BIN)/python -m pytest -n 0 tests/cluster/test_kills.py -k at_random

LEARN_SEEDS ?= 1 2 3
learn: venv  ## whether every method learns the task of tests/trainer/letters.py, for LEARN_SEEDS, in a table; every family; what a step holds; PPO beside TRL's
	LEARN_SEEDS="$(LEARN_SEEDS)" $(BIN)/python -m pytest -n 0 -s --timeout 1800 tests/trainer/test_learning.py
	$(BIN)/python -m pytest -n 0 tests/trainer/test_architectures.py
	$(BIN)/python -m pytest -n 0 -s -m slow tests/trainer/test_held.py
	$(BIN)/python -m pytest -n 0 -m slow tests/trainer/test_against_trl.py

servers: venv  ## build the S3 server and grpcurl that some tests need (needs Go)
	tools/servers.sh

cluster: venv  ## a real two-node Kubernetes on this machine, with S3 and PostgreSQL (needs root, Go)
	$(BIN)/python -m tests.cluster.harness up

images: venv  ## build both container images and hand them to the cluster that runs
	$(BIN)/python -m tests.cluster.harness images

cluster-down:  ## end the cluster and clean everything it left
	$(PYTHON) -m tests.cluster.harness down

generated: venv  ## make again what is made: protobuf code, schema, docs/spec.md
	tools/generated.sh

bench: venv  ## benchmarks, printed with ratios
	$(BIN)/python benchmarks/service/bench.py
	$(BIN)/python benchmarks/plan/bench.py
	$(BIN)/python benchmarks/overhead/bench.py

bench-cluster: venv  ## what the service costs beside a bare client of the same API server, on the cluster that runs
	$(BIN)/python -m benchmarks.cluster.bench

LOCK := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --quiet \
  --custom-compile-command "make lock"
lock: venv  ## resolve the dependencies again: all of them, and the parts that the images install
	$(BIN)/uv pip compile pyproject.toml --all-extras $(LOCK) --upgrade -o requirements.lock
	printf '%s\n' 'uv>=0.9,<1' 'hatchling>=1.27' | $(BIN)/uv pip compile - $(LOCK) --upgrade -o requirements-bootstrap.lock
	$(BIN)/uv pip compile pyproject.toml --extra service $(LOCK) -c requirements.lock -o requirements-service.lock
	printf '%s\n' typer rich | $(BIN)/uv pip compile pyproject.toml - --extra trainer --extra trackers $(LOCK) -c requirements.lock \
	  -o requirements-trainer.lock

clean:  ## remove what was built here
	rm -rf .venv .servers .cache dist build examples/data examples/base

.PHONY: help venv demo test check soak learn servers cluster images cluster-down generated bench bench-cluster lock clean
.DEFAULT_GOAL := help

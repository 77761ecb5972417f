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
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests

check: venv  ## format, lint, types, layers, protos, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy service/hone trainer_image/hone_trainer
	$(BIN)/lint-imports
	$(BIN)/buf lint
	tools/generated.sh --check

servers: venv  ## build the S3 server and grpcurl that some tests need (needs Go)
	tools/servers.sh

generated: venv  ## make again what is made: protobuf code, schema, docs/spec.md
	tools/generated.sh

bench: venv  ## benchmarks, printed with ratios
	$(BIN)/python benchmarks/service/bench.py
	$(BIN)/python benchmarks/overhead/bench.py

lock: venv  ## resolve the dependencies again
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --custom-compile-command "make lock" --upgrade --quiet -o requirements.lock
	echo 'uv>=0.9,<1' | $(BIN)/uv pip compile - --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --no-header --upgrade --quiet -o requirements-bootstrap.lock

clean:  ## remove what was built here
	rm -rf .venv .servers .cache dist build examples/data examples/base

.PHONY: help venv demo test check servers generated bench lock clean
.DEFAULT_GOAL := help

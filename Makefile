# Every target sets up .venv by itself, with the exact versions of constraints/cpu.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINTED := comet_megatron tools tests benchmarks examples setup.py

.PHONY: demo test test-slow test-faults test-gpu test-compat check lint format benchmark benchmark-gpu clean help

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
	$(BIN)/python -m pytest -m "not slow and not faults and not gpu"

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not faults and not gpu"

test-faults: $(READY)  ## kills, signals, full disks and flipped bytes, the long ones too
	$(BIN)/python -m pytest tests/faults tests/distributed/test_checkpoint_state.py -m "not gpu"

# On the machine with the GPU, with the Python that has its torch and, if possible, Transformer Engine.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
test-gpu:  ## what needs a GPU; elsewhere it is skipped, saying why; GPU_PYTHON=... chooses the Python
	$(GPU_PYTHON) -m pytest tests/gpu -rs --durations=10

# A second environment, with transformers 4 and nothing of ours, loads what this one exports.
COMPAT := $(VENV)-transformers4
COMPAT_READY := $(COMPAT)/.ready
EXPORTS := build/compat
$(COMPAT_READY): constraints/transformers4.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install -q --disable-pip-version-check -c constraints/transformers4.txt torch numpy
	$(COMPAT)/bin/python -m pip install -q --disable-pip-version-check -c constraints/transformers4.txt \
		transformers safetensors pytest pytest-timeout
	touch $@

test-compat: $(READY) $(COMPAT_READY)  ## exports load and compute the same on transformers 4 and on the installed version
	rm -rf $(EXPORTS)
	$(BIN)/python tests/compat/make_exports.py $(EXPORTS)
	COMET_EXPORTS=$(EXPORTS) COMET_TRANSFORMERS=4.57.6 $(COMPAT)/bin/python -m pytest --noconftest tests/compat
	COMET_EXPORTS=$(EXPORTS) COMET_TRANSFORMERS=5. $(BIN)/python -m pytest --noconftest tests/compat

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
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/state.py

benchmark-gpu:  ## figures of one GPU beside their reach (benchmarks/gpu.py)
	$(GPU_PYTHON) benchmarks/gpu.py

clean:  ## remove what the targets made
	rm -rf $(VENV) $(COMPAT) runs build *.egg-info .pytest_cache .ruff_cache

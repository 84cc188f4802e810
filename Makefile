# Everything a person or CI calls. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-cgroup2 test-gpu test-litellm check study-judge bench compare swap soak build clean

PYTHON ?= python3
BIN := .venv/bin
ROOT := $(shell [ "$$(id -u)" = 0 ] && echo yes)
ENGINES := $(if $(ROOT),--require engines)
SLOWEST := --durations=25
# By the file: what a module's tests share is made once. Boxes mostly wait, so one more than cores.
AT_ONCE := --dist loadfile --no-loadscope-reorder

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed ## set up what is missing, then run a short real session without a key
	$(BIN)/nightlab setup
	$(BIN)/nightlab run --researcher tpe --attempts 6 --budget-seconds 15

test: .venv/.developed chromium engines ## set up what is missing, then run every test
	$(BIN)/nightlab setup
	$(BIN)/pytest -n 3 $(AT_ONCE) $(SLOWEST) --require docker --require chromium $(ENGINES)

test-fast: .venv/.developed ## the tests that need no engine and are not slow, for the inner loop (3 minutes)
	$(BIN)/pytest -n 2 $(AT_ONCE) -m "not docker and not slow" $(SLOWEST)

test-gpu: .venv/.developed ## what needs an NVIDIA GPU; says why where nothing was run
	@if $(BIN)/python -c 'from sandbox.gpu.inventory import named_gpus; named_gpus("nvidia", ())' 2>/dev/null; \
	then $(BIN)/pytest -m gpu --require gpu --require docker; \
	else echo "SKIPPED, nothing was run: there is no NVIDIA GPU or no driver here; the tests are:"; \
	  $(BIN)/pytest -m gpu --collect-only -q; fi

test-litellm: .venv/.developed .litellm/.installed ## a night through a real LiteLLM proxy (760 MB, 2 minutes to install)
	$(BIN)/pytest tests/whole/test_litellm.py

test-cgroup2: .venv/.developed ## the walls' tests on cgroup v2 and a current engine, in an emulated machine (an hour)
	$(BIN)/nightlab setup
	$(BIN)/python -m tests.bench.cgroup2

check: .venv/.developed ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

study-judge: .venv/.developed ## how often a night keeps luck, and how small a gain it finds (simulated)
	$(BIN)/python -m tests.bench.study_judge --docs

bench: .venv/.developed ## what a box and a score cost, and how far honest models are from a false alarm
	$(BIN)/nightlab setup
	$(BIN)/python -m tests.bench.bench_overhead
	$(BIN)/python -m tests.bench.bench_kill
	$(BIN)/python -m tests.bench.bench_score

soak: .venv/.developed ## hundreds of random hostile runs: no wrong cause, nothing left (about 5 minutes)
	$(BIN)/nightlab setup
	$(BIN)/python -m tests.bench.soak --runs 500

compare: .venv/.developed ## random, tpe and a scripted model on the workload: 45 trainings of 20 s
	$(BIN)/nightlab setup
	$(BIN)/python -m tests.bench.compare --seeds 1 2 3 --attempts 15 --budget-seconds 20

swap: .venv/.developed ## one program on three base images, made from Debian's packages (about 10 minutes)
	@command -v mmdebstrap >/dev/null || { [ -n "$(ROOT)" ] && apt-get install -y -qq --no-install-recommends mmdebstrap; }
	$(BIN)/nightlab setup
	$(BIN)/python -m tests.bench.swap

build: .venv/.developed ## sdist and wheel in dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove what make made here; sessions in runs/ stay
	rm -rf .venv .litellm .engines build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nightlab needs Python 3.11 or later; set PYTHON=python3.x"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || [ -z "$(ROOT)" ] || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

.venv/.installed: .venv/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.developed: .venv/.installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

.litellm/.installed:
	$(PYTHON) -m venv .litellm
	.litellm/bin/pip install --quiet 'litellm[proxy]==1.108.7'
	@touch $@

.PHONY: chromium
chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { [ -n "$(ROOT)" ] && apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  { echo "the report's tests need chromium; install it and try again"; exit 2; }

.PHONY: engines
engines:  # only root can start engines of its own; without them the tests that need one skip, and say so
	@[ -z "$(ROOT)" ] || { command -v podman && command -v gcc; } >/dev/null || \
	  { apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends podman gcc libc6-dev >/dev/null; } || \
	  { echo "the GPU tests need podman and gcc; install them and try again"; exit 2; }
	@[ -z "$(ROOT)" ] || sh tests/support/gpu/cdi-engine.sh .engines || \
	  { echo "the GPU tests need a Docker Engine of 25.0 or later; install one"; exit 2; }

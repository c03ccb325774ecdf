# `make help` lists the targets. On a fresh machine `make demo` and `make test` each do everything, the install included.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo_output
THREADS ?= 2
ARGS ?=

BIN := $(VENV)/bin
DEMO_ARGS = --config experiments/cidir_dirlab.yaml --data.root $(DEMO)/data --runs $(DEMO)/runs --wandb false
STAMP := $(VENV)/.installed

# Single-threaded libraries under several threads of torch are slower on small machines; one number governs both.
export OMP_NUM_THREADS := $(THREADS)
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format type bench bench-short wheel wheel-check clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with medinr, editable, and the tested releases of what it needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "medinr needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON, e.g. make install PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing medinr and what it needs into $(VENV) (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

demo: $(STAMP) ## the main experiment on generated data, at a laptop's size
	$(BIN)/medinr phantom dirlab --out $(DEMO)/data --cases 1 --size 96 --phases extremes
	$(BIN)/medinr fit $(DEMO_ARGS) --trainer.max_steps 600
	$(BIN)/medinr test $(DEMO_ARGS)
	$(BIN)/medinr predict $(DEMO_ARGS) --out $(DEMO)/results
	@echo "Look at $(DEMO)/results/figures/registration.png (the registration) and alpha.png (error, Dice, folding and"
	@echo "bending against the regularization weight); images, field, transform and metrics.json are in $(DEMO)/results."

test: $(STAMP) ## the default test suite (ARGS="-m slow" for the slow ones)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff format and repair what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: $(STAMP) ## mypy --strict
	$(BIN)/mypy

bench: $(STAMP) ## the benchmarks: times, memory, noise (ARGS="--short --out bench.jsonl")
	$(BIN)/python -m tests.benchmarks.run --threads $(THREADS) $(ARGS)

bench-short: $(STAMP) ## the benchmarks in a short mode: that they run, not what they measure
	$(BIN)/python -m tests.benchmarks.run --threads $(THREADS) --short --repeats 1 --points 1000 $(ARGS)

wheel: $(STAMP) ## build dist/medinr-*.whl
	$(BIN)/python -m build --wheel --outdir dist

wheel-check: $(STAMP) ## build the wheel, install it in a fresh environment, and register a phantom with it
	rm -rf build/wheel-check
	$(BIN)/python -m build --wheel --outdir build/wheel-check
	$(PYTHON) -m venv build/wheel-check/venv
	build/wheel-check/venv/bin/python -m pip install --quiet --disable-pip-version-check build/wheel-check/*.whl -c constraints.txt
	sh tests/wheel_check.sh build/wheel-check/venv build/wheel-check/work

clean: ## remove builds, caches and the demo's output; keeps .venv
	rm -rf build dist $(DEMO) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find medinr data_modules tests -name __pycache__ -type d -prune -exec rm -rf {} +

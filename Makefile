# make demo, make test: everything else is below. Each target makes the environment it needs when there is none.
# PYTHON=python3.12 chooses another interpreter for a new environment.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# pip reads these wherever it runs, in isolated builds too (PIP_BUILD_CONSTRAINT is what newer pips ask for).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint format bench soak wheel-check env clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         train, save, kill a worker, recover on another mesh, reshard: the whole story, on this machine"
	@echo "make test         lint, then every test"
	@echo "make lint         ruff, mypy --strict and the import rules"
	@echo "make format       rewrite the code as 'make lint' wants it"
	@echo "make bench        the benchmarks, against their peers, in one run"
	@echo "make soak         the tests that run long"
	@echo "make wheel-check  build the wheel, install it in a clean environment, try it there"
	@echo "make env          only the environment, .venv"
	@echo "make clean        delete what builds, tests and demos left behind (.venv stays)"

demo: $(STAMP)
	@$(BIN)/ckpt demo

test: lint
	@echo "==> Running the tests"
	@$(BIN)/python -m pytest -q

lint: $(STAMP)
	@echo "==> Checking style (ruff), types (mypy --strict) and which module may import which (import-linter)"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "Some files are not formatted; 'make format' does it:"; $(BIN)/ruff format --check; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(STAMP)
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format

bench: $(STAMP)
	@echo "==> Running the benchmarks, 1 GiB, 20,000 small tensors, saving while training (half an hour; a quiet machine gives steadier numbers)"
	@$(BIN)/python -m benchmarks.save_load
	@$(BIN)/python -m benchmarks.load
	@$(BIN)/python -m benchmarks.many_tensors
	@$(BIN)/python -m benchmarks.async_save
	@$(BIN)/python -m benchmarks.training_loop

soak: $(STAMP)
	@echo "==> Running the long tests"
	@HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -q -m soak

wheel-check: $(STAMP)
	@echo "==> Building the wheel and trying it in a clean environment (some minutes: torch is installed once more)"
	@$(BIN)/python -m pytest -q -m wheel tests/packaging

env: $(STAMP)

# A change of the dependencies installs again into the same environment; an environment whose interpreter is gone is made anew.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no '$(PYTHON)' here. Install Python 3.11 or newer, or say which one to use: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "'$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), and this project needs Python 3.11 or newer. Say which one to use: make PYTHON=python3.12" >&2; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "==> Making an environment in .venv"; \
		rm -rf .venv; \
		"$(PYTHON)" -m venv .venv || { rm -rf .venv; echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2; exit 1; }; \
	fi
	@echo "==> Installing this project and its dependencies into .venv, at the versions in constraints.txt (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --progress-bar off --editable '.[dev]'
	@touch $@
	@echo "==> The environment is ready"

clean:
	@echo "==> Deleting what builds, tests and demos left behind. The environment stays; 'rm -rf .venv' deletes it"
	@rm -rf build dist out demo_out .bench .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	@rm -rf ./*.egg-info formats/*.egg-info cli/*.egg-info
	@find . -name .venv -prune -o -name .git -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

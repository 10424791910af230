PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
STAMP := $(VENV)/.installed
EXAMPLES := $(VENV)/.examples
# Without compiling: of thousands of files the demo reads few. The tests compile all, since a warning
# about a library's source would fail the test that reads it first.
INSTALL := $(BIN)/python -m pip install -q --no-compile -c constraints.txt

.PHONY: demo examples test test-fast test-oldest check docs docs-serve clean venv links

# A host this small is no faster on two threads, and much slower where they wait for each other.
demo: $(DEMO)
	OMP_NUM_THREADS=1 $(BIN)/tokenprune demo

# Each script of examples/ and the notebook, a line with its time for each.
examples: $(EXAMPLES)
	OMP_NUM_THREADS=1 $(BIN)/python examples/run.py

# One thread a process: two processes share the machine, and sums keep their order.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q --ignore tests/docs

# A minute: unit tests, and all behaviours over the core toys and the core rows of the zoo.
test-fast: $(STAMP)
	HYPOTHESIS_PROFILE=fast OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"

# The same on the oldest torch and transformers that pyproject.toml allows, in a folder of its own.
# Every family is certified there, but for what those versions do not have.
OLDEST := .venv-oldest
NEWER := prr or rope_grouped_queries or videoprism
test-oldest: links
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q torch==2.8.0 torchvision==0.23.0 transformers==5.0.0 \
		timm==1.0.22 numpy==2.2.* jaxtyping pydantic pyyaml safetensors pillow rich typer matplotlib \
		scikit-learn accelerate pytest pytest-xdist hypothesis beartype
	HYPOTHESIS_PROFILE=fast OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) \
		$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -q -m "not slow" tests
	HYPOTHESIS_PROFILE=fast OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) \
		$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -q tests/zoo/test_zoo.py \
		-k "certificate_holds and not ($(NEWER))"

check: $(STAMP) links
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The site in build/site; then every code block of README and site runs, on small models.
DOCS := $(VENV)/.docs
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
docs: $(DOCS)
	$(MKDOCS) build --strict --quiet
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/docs

docs-serve: $(DOCS)
	$(MKDOCS) serve

$(DOCS): $(STAMP)
	$(INSTALL) --no-build-isolation -e '.[docs]'
	touch $@

venv: $(STAMP)

# Each stamp is a set of packages: what the demo needs, then what tests or examples add to it.
# torch comes first and exact, so that nothing after it asks for another build of it.
$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) torch==2.14.1 torchvision==0.29.1
	$(INSTALL) --no-build-isolation -e '.[train]'
	touch $@

$(STAMP): $(DEMO)
	$(INSTALL) --no-build-isolation -e '.[dev]'
	-PYTHONWARNINGS=ignore $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	touch $@

$(EXAMPLES): $(DEMO)
	$(INSTALL) --no-build-isolation -e '.[examples]'
	touch $@

# mypy and editors find the two top-level folders under the names they are installed with.
links:
	ln -sfn ../adapters tokenprune/adapters
	ln -sfn ../recipes tokenprune/recipes

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# of the demo: sid or pid
METHOD ?= sid
# two OpenMP pools on two cores slow each other down: tests run with one thread each
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint accept faults docs assets web-runtime clean

demo: $(VENV)/.demo
	OMP_NUM_THREADS=2 $(BIN)/limbeck distill recipes/digits-$(METHOD).toml --out runs/demo-$(METHOD)

test: $(VENV)/.test lint
	$(BIN)/pytest -q -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

accept: $(VENV)/.test
	$(BIN)/python tools/accept.py
	$(BIN)/python tools/tables.py

# kills, full disks, damage, hostile and malformed input: two to four minutes
faults: $(VENV)/.test
	$(BIN)/python tools/faults.py

docs: $(VENV)/.test
	$(BIN)/python tools/tables.py
	$(BIN)/python tools/site.py site

# the bundled models, from their recipes
assets: $(VENV)/.test
	$(BIN)/limbeck teach recipes/digits-classifier.toml --out runs/digits-classifier
	$(BIN)/python tools/bundle.py runs/digits-classifier digits
	$(BIN)/limbeck teach recipes/digits-teacher.toml --out runs/digits-teacher
	$(BIN)/python tools/bundle.py runs/digits-teacher digits
	$(BIN)/limbeck teach recipes/fashion-classifier.toml --out runs/fashion-classifier
	$(BIN)/python tools/bundle.py runs/fashion-classifier fashion
	$(BIN)/limbeck teach recipes/fashion-teacher.toml --out runs/fashion-teacher
	$(BIN)/python tools/bundle.py runs/fashion-teacher fashion

# what runs a generator in the browser; needs npm
web-runtime: $(VENV)/.demo
	$(BIN)/python tools/web_runtime.py web-runtime

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.demo requirements-dev.txt
	$(BIN)/pip install -q -c constraints.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache

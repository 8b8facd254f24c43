# Each target does its own set-up: a virtual environment in .venv, then the work.
PYTHON ?= python3
BIN := .venv/bin
# Two threads fighting over two test processes are slower than one each.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q

.PHONY: setup demo test slow lint bench tutorials clean

setup: .venv/ready

# torch first and alone: the constraint takes a CPU build where one is at hand.
.venv/ready: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m pyrosc demo --out demo

test: setup
	$(TEST)

slow: setup
	$(TEST) -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tutorials: setup
	for page in tutorials/*.py; do echo "== $$page"; $(BIN)/python $$page || exit 1; done

bench: setup
	$(BIN)/python benchmarks/density.py
	$(BIN)/python benchmarks/first_layer.py
	$(BIN)/python benchmarks/speed.py --short

clean:
	rm -rf .venv .venv-bench build dist *.egg-info demo

# `make demo` and `make test` work on a fresh machine: they create .venv and install the pinned versions first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test gate lint bench bench-gpu clean

demo: $(INSTALLED)
	$(BIN)/vgs demo --out runs/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q
	$(MAKE) gate

gate: $(INSTALLED)  # time and memory against eager PyTorch and the floor, within bounds
	$(BIN)/python -m pytest benchmarks/test_gate.py -q

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)  # about an hour on two cores
	$(BIN)/python -m benchmarks loss --rounds 3 --out benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks report --plots benchmarks/results/cpu --short benchmarks/results/cpu.json

bench-gpu:  # under nine minutes, straight from the checkout, with whatever peers are installed
	PYTHONPATH=. $(PYTHON) -m benchmarks loss --device cuda --minutes 7.5 --out benchmarks/results/gpu.json
	PYTHONPATH=. $(PYTHON) -m benchmarks report --plots benchmarks/results/gpu --short benchmarks/results/gpu.json

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info

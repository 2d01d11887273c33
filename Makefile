# `make demo` and `make test` work on a fresh machine: they create .venv and install the pinned versions first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
RESULTS ?= benchmarks/results

.PHONY: demo test gate lint bench bench-gpu bench-step clean

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

bench: $(INSTALLED)  # over an hour on two cores
	$(BIN)/python -m benchmarks loss --rounds 3 --out $(RESULTS)/cpu.json
	$(BIN)/python -m benchmarks report --plots $(RESULTS)/cpu --short $(RESULTS)/cpu.json

bench-gpu:  # under nine minutes, straight from the checkout, with whatever peers are installed
	$(PYTHON) -m benchmarks loss --device cuda --minutes 7.5 $(if $(COMMIT),--commit $(COMMIT)) --out $(RESULTS)/gpu.json
	$(PYTHON) -m benchmarks report --plots $(RESULTS)/gpu --short $(RESULTS)/gpu.json

bench-step:  # under nine minutes on a CUDA device; elsewhere the same tables, counted
	$(PYTHON) -m benchmarks step --minutes 8 $(if $(COMMIT),--commit $(COMMIT)) --out $(RESULTS)/step/gpu.json --plots $(RESULTS)/step

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info

# `make demo` and `make test` work on a fresh machine: they create .venv and install the pinned versions first.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed
OLDEST := .venv-oldest
EVAL := .venv-eval
DOCS := .venv-docs
HOSTS := .venv-verl .venv-swift
RESULTS ?= benchmarks/results
# Neighbouring tests stay in one process, which sets up once what they share.
PYTEST := -m pytest -q -n $(WORKERS) --dist worksteal
NEWEST_TESTS := CONSTRAINTS=constraints.txt OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)
# Python with stand-ins for CUDA's libraries, under the CUDA build of PyTorch; needs gcc.
EMULATED := OMP_NUM_THREADS=1 $(BIN)/python -m tests.emulation.device.build
# Tests inside another trainer: on a CPU, and without the set-up of the others.
HOST_TESTS := -m pytest -q -p no:cacheprovider --confcutdir tests/hosts
# What meets the libraries: exactness on both backends, torch.compile, models, a trainer of each kind, the command.
OLDEST_TESTS := tests/test_environment.py \
	$(addprefix tests/kernels/test_,divergence_family.py integration_torch.py loss_gradients.py loss_values.py rows_triton.py) \
	tests/models tests/test_one_step.py tests/cli \
	$(addprefix tests/trainers/test_,distillation.py grpo.py host_hooks.py self_distillation.py)

.PHONY: demo test test-slow test-all test-oldest lmms-eval test-eval test-verl test-swift test-hosts gate test-report emulate gpu-session gpu-rehearsal lint types docs docs-serve bench bench-gpu bench-step mutations clean

demo: $(INSTALLED)
	$(BIN)/vgs demo --out runs/demo

test: $(INSTALLED)  # what to run while working: at most eight minutes on two cores
	$(NEWEST_TESTS) -m "not slow"

test-slow: $(INSTALLED)  # the rest
	$(NEWEST_TESTS) -m slow

test-all: test test-slow gate

gate: $(INSTALLED)  # time and memory against eager PyTorch and the floor, within bounds
	$(BIN)/python -m pytest benchmarks/test_gate.py -q

test-oldest: $(OLDEST)/installed  # a short run on the oldest supported versions
	CONSTRAINTS=constraints-oldest.txt OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m "not slow" $(OLDEST_TESTS)

lmms-eval: $(EVAL)/installed  # what `vgs eval RUN --benchmarks paper` runs in

test-eval: $(EVAL)/installed  # the benchmarks' tasks in lmms-eval itself
	OMP_NUM_THREADS=1 $(EVAL)/bin/python -m pytest -q --confcutdir tests/evaluation/lmms tests/evaluation/lmms

test-verl: .venv-verl/installed  # inside verl 0.9.1, on one and two gloo ranks; some minutes
	OMP_NUM_THREADS=1 .venv-verl/bin/python $(HOST_TESTS) tests/hosts/verl

test-swift: .venv-swift/installed  # inside ms-swift 4.6.0, whole trainer; some minutes
	OMP_NUM_THREADS=1 .venv-swift/bin/python $(HOST_TESTS) tests/hosts/swift

test-hosts:  # a minute, once a week, not in CI, for it asks the package index: what of vgs installs beside each host
	$(PYTHON) tests/hosts/resolve.py

test-report: $(INSTALLED)  # a report on tiny runs, looked at in Chromium, which must be installed; pictures in runs/test-report
	rm -rf runs/test-report && mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/reports --basetemp=runs/test-report
	$(BIN)/python docs/tools/check_report.py runs/test-report/report0/report.html --screenshots runs/test-report/screenshots

mutations: $(INSTALLED)  # how sharp the tests are: some forty faults, one at a time
	$(BIN)/python -m tests.mutations run --out runs/mutations.json --select "not slow" --files 1

emulate: $(INSTALLED)  # the CUDA path without a GPU: call forms counted, then the GPU tests of tests/kernels; an hour on two cores
	$(EMULATED) -m tests.emulation.device.call_matrix
	$(EMULATED) -m tests.emulation.device.time_model
	$(BIN)/python -m tests.emulation.run_kernels calls --whole --check
	$(EMULATED) -m pytest -q -p tests.emulation.device.plugin -m "gpu and not slow" tests/kernels

gpu-session:  # twelve minutes on an H100 or H200: exactness, losses against peers, a training step; commit what it writes
	$(PYTHON) -m benchmarks.session $(if $(COMMIT),--commit $(COMMIT)) --out $(RESULTS)/session

gpu-rehearsal: $(INSTALLED)  # the same on the stand-in device, in some minutes: every command, nothing measured
	$(BIN)/python -m benchmarks.session --rehearse --out runs/session

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

types: $(INSTALLED)  # public names as users see them; seconds on a quiet core, with what it kept in .mypy_cache fewer
	$(BIN)/mypy

docs: $(DOCS)/installed  # the site, into site/; a broken link, and anything from another site, is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	$(DOCS)/bin/python docs/tools/check_site.py site

docs-serve: $(DOCS)/installed  # shows the site on this machine, and follows changes
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve

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

$(OLDEST)/installed: setup.py constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]'
	touch $@

# lmms-eval's own requirements would take math-verify 0.1.0 and a filelock that it cannot import: ours are pinned.
$(EVAL)/installed: setup.py requirements-eval.txt
	$(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-eval.txt
	$(EVAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3 -e .
	touch $@

$(DOCS)/installed: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

# The host itself without what it names as its dependencies: its requirements file has what is needed here.
$(HOSTS:=/installed): .venv-%/installed: setup.py tests/hosts/%/requirements.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r tests/hosts/$*/requirements.txt setuptools
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		$(if $(filter verl,$*),verl==0.9.1,ms-swift==4.6.0) -e .
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(EVAL) $(DOCS) $(HOSTS) runs site build *.egg-info

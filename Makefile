# Everything runs on one machine, without a cluster. The first target installs; all others see to it that it was done.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup locked demo test test-slowest test-others test-wheel check chaos fuzz soak bench cluster cluster-stop

setup: $(READY)

# torch first: DeepSpeed's build looks for it. DS_BUILD_OPS=0: its operators are compiled when first used, or never.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/pip install -c constraints.txt -e '.[cpu,dev]'
	touch $@

# The same, every package but torch (whose build depends on the machine) held to its SHA-256.
locked: pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/pip install --require-hashes --no-deps -r requirements.lock
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	$(BIN)/pip install --no-deps -e .
	touch $(READY)

demo: $(READY)
	$(BIN)/oppu demo

# Two processes, which take about as long as each other.
SLOWEST := tests/test_faults.py tests/test_group.py tests/test_shard_actors.py tests/test_submit.py

test: $(READY)
	$(MAKE) --no-print-directory -j 2 test-slowest test-others

test-slowest: $(READY)
	$(BIN)/pytest -q $(SLOWEST)

test-others: $(READY)
	$(BIN)/pytest -q $(SLOWEST:%=--ignore=%)

# The wheel under another Python, with dependencies of its own: make test-wheel PYTHON=python3.13
WHEEL := .venv/wheel-$(notdir $(PYTHON))

test-wheel: $(READY)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/pip install -c constraints.txt torch==2.13.0
	DS_BUILD_OPS=0 $(WHEEL)/bin/pip install -c constraints.txt '.[cpu]'
	rm -r build
	WHEEL_PYTHON=$(WHEEL)/bin/python $(BIN)/pytest -q tests/test_wheel.py

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Every fault of the README's table; most of an hour. As root, it cuts networks and fills disks of its own, too.
chaos: $(READY)
	$(BIN)/python -m jobs.chaos

fuzz: $(READY)
	$(BIN)/python -m jobs.fuzz

soak: $(READY)
	$(BIN)/python -m jobs.soak

bench: $(READY)
	$(BIN)/oppu bench train

# A Ray head on this machine, with dashboard, jobs and token; see `oppu submit`.
cluster: $(READY)
	$(BIN)/oppu cluster start

cluster-stop: $(READY)
	$(BIN)/oppu cluster stop

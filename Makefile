# `make fit` and `make test` need nothing but Python 3.11+ with venv; the environment is made once, on the first call.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: fit fit-record test check tensorboard clean

# more flags: make fit ARGS="--seed 1 --output runs/second"
fit: $(INSTALLED)
	$(BIN)/python -m training.fit $(ARGS)

# the same with five policies, each from its own seed: the record
fit-record: $(INSTALLED)
	$(BIN)/python -m training.fit --output runs/record --amounts.seeds 5 $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

# the same as .ci/run, in the environment at hand
check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --cov --cov-report=term

tensorboard: $(INSTALLED)
	$(BIN)/tensorboard --logdir runs

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d; try: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

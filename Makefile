# Targets install what is missing, into the active virtual environment or into .venv. `make help` lists them.

VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PYTHON := $(VENV)/bin/python
BASE_PYTHON ?= python3
# One stamp for each set of requirements and this state of the three files that name them.
STAMP := $(VENV)/.encoderkit-$(shell { pwd; cat setup.cfg pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)
LINKS := build/links/encoderkit

# The constraints, with the line of torch replaced by the torch that is there if it is new enough: on GPU machines that
# one is built for their CUDA.
define CONSTRAINTS
import re, sys
from importlib import metadata
text = open("constraints.txt").read()
try:
    found = metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) >= (2, 10):
        text = re.sub(r"(?m)^torch==.*$$", "torch==" + found, text)
except metadata.PackageNotFoundError:
    pass
sys.stdout.write(text)
endef
export CONSTRAINTS

.PHONY: help quickstart test check lint types bench bench-gpu race torture clean
.SECONDARY:
help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(STAMP)-run  ## pretrain, fine-tune and measure on the embedded corpus
	$(PYTHON) -m encoderkit.finetune.quickstart --overwrite true $(ARGS)

test: $(STAMP)-test  ## the tests
	$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: lint types  ## lint, types, layout and tests
	$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)-check
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(STAMP)-check  # mypy cannot follow the package mapping of setup.cfg; links show it the installed layout
	mkdir -p $(LINKS)
	for folder in kernels encoder pretrain finetune; do ln -sfn ../../../$$folder $(LINKS)/$$folder; done
	MYPYPATH=build/links $(PYTHON) -m mypy -p encoderkit --namespace-packages --explicit-package-bases

bench: $(STAMP)-run  ## beside transformers on this CPU, ten minutes; figures in runs/bench.json
	$(PYTHON) -m encoderkit.finetune.bench $(ARGS)

bench-gpu: $(STAMP)-test  ## tests and benchmarks on a GPU, ten minutes
	$(PYTHON) -m encoderkit.pretrain.bench_gpu

race: $(STAMP)-run  ## equal time for encoderkit and tuned loops of transformers; ARGS='--store STORE'
	$(PYTHON) -m encoderkit.finetune.race run $(ARGS)

torture: $(STAMP)-test  ## kill, corrupt and starve runs for real, at most 30 minutes
	PYTHONPATH=tests $(PYTHON) -m reliability.torture $(ARGS)

clean:  ## remove what was built and cached; .venv, runs/ and stores/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find encoder pretrain finetune kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(PYTHON):
	$(BASE_PYTHON) -m venv $(VENV)

$(STAMP)-%: | $(PYTHON)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "expected Python 3.10 or newer" >&2; exit 2; }
	@$(PYTHON) -c "$$CONSTRAINTS" > $(VENV)/.encoderkit-constraints.txt
	@# setuptools-scm: what seqeval, which has no wheel, is built with
	$(PYTHON) -m pip install -q -c $(VENV)/.encoderkit-constraints.txt setuptools setuptools-scm wheel torch
	$(PYTHON) -m pip install -q -c $(VENV)/.encoderkit-constraints.txt --no-build-isolation -e ".$(EXTRAS_$*)"
	@touch $@

EXTRAS_run :=
EXTRAS_test := [test]
EXTRAS_check := [test,check]

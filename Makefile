# Two commands, each complete on a fresh machine: `make demo` and `make test`.
# TORCH=... is what pip installs as torch; the default takes a CPU build where the index offers one.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.lath-installed
# Interpreted kernels and small matmuls are faster without BLAS threads fighting for two cores.
THREADS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(THREADS) $(BIN)/python -m pytest

.PHONY: demo test test-interpreted test-aot test-slow lint bench clean

demo: $(STAMP)
	$(BIN)/lath run --model smollm2

test: lint test-interpreted test-aot

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[all]"
	touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One process cannot both interpret Triton kernels and compile them, so the suite runs as two.
test-interpreted: $(STAMP)
	TRITON_INTERPRET=1 $(PYTEST) -n 2 --dist loadfile -m "not slow" -q

test-aot: $(STAMP)
	LATH_AOT=1 TRITON_INTERPRET=0 $(PYTEST) -n 2 --dist load -m "aot and not slow" -q

test-slow: $(STAMP)
	TRITON_INTERPRET=1 $(PYTEST) -m slow -q
	LATH_AOT=1 TRITON_INTERPRET=0 $(PYTEST) -n 2 -m "aot and slow" -q

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only -q

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

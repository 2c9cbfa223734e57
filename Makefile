# Every target does the set-up it needs. LEAP_EXTRA=cpu|cuda overrides the choice that dev/setup.sh makes.
# PYTHONSAFEPATH keeps the folder triton_kernels/ off sys.path (vLLM would take it for OpenAI's package).
export PYTHONSAFEPATH := 1
export PYTHON
BIN := .venv/bin
FAST := not e2e and not slow
# Engines start for most of the time that the tests take, on one core each; a file's tests stay together.
PARALLEL ?= -n 2 --dist loadfile

.PHONY: demo test check test-slow bench bench-gpu lint setup clean leap-tiny llama4-tiny

demo: setup
	$(BIN)/leap demo --out runs/demo --force

test: setup
	$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL)

check: setup lint
	$(BIN)/python -m pytest -q -m "$(FAST)" $(PARALLEL)

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python bench/run_all.py

bench-gpu: setup
	$(BIN)/python bench/run_gpu.py

# glibc would return every freed buffer to the system and fault it in again: a third of the step time.
leap-tiny llama4-tiny: export MALLOC_MMAP_THRESHOLD_ := 4294967296
leap-tiny llama4-tiny: export MALLOC_TRIM_THRESHOLD_ := 8589934592
leap-tiny llama4-tiny: export MALLOC_TOP_PAD_ := 268435456
leap-tiny: setup
	$(BIN)/python -m leap_training.tiny --out runs/leap-tiny
llama4-tiny: setup
	$(BIN)/python -m leap_training.tiny --form llama4_text --out runs/llama4-tiny

setup:
	@bash dev/setup.sh

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .schemathesis .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

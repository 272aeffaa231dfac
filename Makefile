# make demo    export and verify the demo voice, synthesize a WAV
# make test    run all tests          make check   style, types, imports, words          make release   build and check the wheel
# make gpu     every check and measurement that needs a GPU, into gpu-sitting/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRITON := .triton

.PHONY: demo test check gpu mutants fuzz faults triton release clean

demo: $(VENV)/.installed
	$(BIN)/melrt demo

test: $(VENV)/.installed triton
	$(BIN)/python -m pytest

# Plants about a hundred faults one at a time, and reports those that no test finds.
mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py

# Attacks melrt with 10,000 bundles, 5,000 checkpoints, thousands of other files and 5,000 arrays, and prints the counts;
# then reads small checkpoints that would fill the memory, and prints the time and memory of each; then sends 3,000
# hostile requests to the HTTP service.
fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz.attacks
	$(BIN)/python tests/fuzz/bombs.py
	$(BIN)/python -m tests.fuzz.service

# Continues after a step that fails, and resumes if it is run again.
gpu: $(VENV)/.installed
	$(BIN)/python -m melrt_benchmarks.sitting --out gpu-sitting

# Kills each command that writes at 60 moments, or fills its disk, and checks what it leaves; a quarter of an hour.
faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults.faults

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -m "not slow" tests/test_words.py tests/test_house.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# A real Triton server for the tests, with a Python of its own: it needs numpy 1. Without it those tests are skipped.
triton:
	@$(MAKE) -s $(TRITON)/.installed || echo "no Triton server: its tests will be skipped"

$(TRITON)/.installed: Makefile
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install -q --disable-pip-version-check -e ".[output]" "numpy<2" onnxruntime
	$(TRITON)/bin/python -m pip install -q --disable-pip-version-check --no-deps nvidia-pytriton==0.7.0
	touch $@

# Source distribution and wheel in dist/, and the wheel used in an empty environment.
release: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m pytest -q tests/test_release.py

clean:
	rm -rf $(VENV) $(TRITON) demo dist

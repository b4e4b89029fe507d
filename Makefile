# There is no other set-up: each target makes .venv and installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

NATIVE := CMakeLists.txt $(wildcard csrc/*)

# C++ and CUDA sources.
COMPILED = $(shell find csrc src tests -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')

.PHONY: demo serve test test-all test-ray experiments-smoke lint format docs bench sanitize clean

$(VENV)/installed-demo: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the package into $(VENV): one to five minutes, once."
	$(BIN)/python -m pip install -c constraints.txt -e ".[train]"
	touch $@

# With `required` a failed build of the compiled kernels is an error; otherwise the package installs without them.
$(VENV)/installed-test: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch, the package and the tools of its tests into $(VENV): two to ten minutes, once."
	ANYMAMBA_NATIVE=required $(BIN)/python -m pip install -c constraints.txt -e ".[test,lint]"
	touch $@

demo: $(VENV)/installed-demo
	$(BIN)/anymamba demo

$(VENV)/installed-serve: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch, the package and its server into $(VENV): one to five minutes, once."
	$(BIN)/python -m pip install -c constraints.txt -e ".[train,serve]"
	touch $@

# Serves the demo's model, which is trained first if it is not there: about three minutes.
serve: $(VENV)/installed-serve
	test -f runs/demo/model.safetensors || $(BIN)/anymamba demo
	$(BIN)/anymamba serve --model runs/demo --chat-template plain $(ARGS)

# Two processes share the files of tests, with one thread each. `make test WORKERS=0` runs all in one process.
WORKERS ?= 2

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

# Compiles llama.cpp (about ten minutes on two cores) to check that it can read the GGUF files that we write.
test-all: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test-all]"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Two replicas under Ray Serve on this machine, one of which is killed.
test-ray: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	$(BIN)/python -m pytest tests/serving/replicas

# Every experiment at toy size: files, resumption, charts.
experiments-smoke: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/experiments/test_smoke.py

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(COMPILED)

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(COMPILED)

# The site is built from the sources: only the tools are installed for it, not the package and torch.
$(VENV)/installed-docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
		| xargs $(BIN)/python -m pip install --quiet -c constraints.txt
	touch $@

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir site
	@echo "the site is in site/; open site/index.html"

# Compiles llama.cpp, too: it is the peer of a token in each weight format.
bench: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks

# Runs only the kernels, under AddressSanitizer with UndefinedBehaviorSanitizer and under ThreadSanitizer.
sanitize:
	tests/native/run build/sanitize-address -fsanitize=address,undefined -fno-sanitize-recover=all
	tests/native/run build/sanitize-thread -fsanitize=thread

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache

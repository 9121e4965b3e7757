# Everything a newcomer needs is `make serve` and `make test`; both set themselves up in .venv. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/python -m uv
SOURCES := Cargo.toml Cargo.lock pyproject.toml $(shell find rust -name '*.rs' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help serve dev test test-rust test-python test-gpu clients schemathesis simulate planted-faults fuzz asan sm90 lint fmt bench dist clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*?## ' $(MAKEFILE_LIST) | awk -F':.*?## ' '{printf "  make %-14s %s\n", $$1, $$2}'

serve: $(VENV)/.built ## build, fetch the small default model, serve it on http://127.0.0.1:8000
	@$(BIN)/octavo serve $(ARGS)

dev: $(VENV)/.built $(VENV)/.dev ## the same set-up without serving, plus the tools for development

$(VENV)/.uv:
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

# The release build of the extension, installed in place: edits of Python files need no rebuild. Bytecode is made now, on
# all cores, and not by the first start. Without a group maturin installs `dev`, which serving does not need.
$(VENV)/.built: $(VENV)/.uv $(SOURCES)
	@echo "== installing the dependencies and building the extension (the first time takes a few minutes)"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --quiet --python $(BIN)/python --group build
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) PATH="$(CURDIR)/$(BIN):$$PATH" UV_COMPILE_BYTECODE=1 $(BIN)/maturin develop --release --uv --extras uvloop,hub --group build
	@touch $@

$(VENV)/.dev: $(VENV)/.uv pyproject.toml
	@echo "== installing the development tools"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --quiet --python $(BIN)/python --group dev
	@touch $@

test: test-rust test-python ## all tests

# Tests and lints share the release build's dependencies: tests run what is served. The binding itself is left out, so
# they need no Python library to link.
test-rust: ## the core without Python
	cargo test --release --quiet --features binding-dependencies

test-python: dev ## everything else, on the CPU
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

simulate: ## 60 s of the seeded simulation on fresh seeds (SECONDS_=... for longer)
	OCTAVO_SIM_SECONDS=$(or $(SECONDS_),60) cargo test --release --features binding-dependencies --test simulation -- --nocapture

planted-faults: ## plant faults in a copy of the core, one by one: the simulation must find each (minutes)
	$(PYTHON) tests/simulation/planted_faults.py $(ARGS)

# libFuzzer over the stable compiler's own coverage counters. What it finds goes to target/fuzz/findings; inputs that
# reach new code stay in target/fuzz/corpus, those worth keeping in fuzz/corpus, which `cargo test` replays.
FUZZ_HOST = $(shell rustc -vV | sed -n 's/host: //p')
FUZZ_FLAGS = --cfg fuzzing -Cpasses=sancov-module $(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters pc-table trace-compares)
FUZZ_LIMITS = -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=1024 -max_len=16384

fuzz: ## fuzz the GGUF reader and the chat templates for 60 s each (SECONDS_=... for longer); the first build takes minutes
	RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --release --manifest-path fuzz/Cargo.toml --target-dir target/fuzz --target $(FUZZ_HOST)
	@mkdir -p target/fuzz/findings target/fuzz/corpus/{gguf,template}
	@for target in gguf template; do \
		target/fuzz/$(FUZZ_HOST)/release/$$target target/fuzz/corpus/$$target fuzz/corpus/$$target -dict=fuzz/$$target.dict \
			-artifact_prefix=target/fuzz/findings/$$target- -max_total_time=$(or $(SECONDS_),60) $(FUZZ_LIMITS) || exit 1; \
	done

# The stable compiler ships the runtime of the sanitizer, but takes its flag only when it is told that it may.
asan: ## the CPU's own code (rust/cpu, all its unsafe blocks) by its tests under AddressSanitizer
	@mkdir -p target/asan
	RUSTC_BOOTSTRAP=1 rustc --edition 2021 --test -Zsanitizer=address -Copt-level=2 -Cdebuginfo=1 -Ccodegen-units=16 -Awarnings \
		tests/cpu/alone.rs -o target/asan/cpu
	target/asan/cpu

test-gpu: dev ## the kernels and the engine on a CUDA device
	$(BIN)/python -m pytest -q -m gpu tests/engine $(ARGS)  # these need the card for themselves
	$(BIN)/python -m pytest -q -m gpu tests/kernels -n auto --maxprocesses 16 $(ARGS)

SM90 = $(basename $(notdir $(wildcard tests/kernels/compile_sm90_*.py)))

sm90: dev ## compile all kernels for an H100 anew, and note what came of them (minutes; after a change of kernels)
	@for module in $(SM90); do PYTHONPATH=python $(BIN)/python -m tests.kernels.$$module --remember || exit 1; done

clients: dev ## real client packages against a server, each in an environment of its own (ARGS="openai dspy" for some)
	$(BIN)/python -m tests.clients.run $(ARGS)

schemathesis: dev ## broken requests on every route, 50 cases each (CASES=2000 for more): none may be a 5xx
	SCHEMATHESIS_CASES=$(or $(CASES),50) $(BIN)/python -m tests.clients.run schemathesis

lint: dev ## ruff, mypy, stubtest, cargo fmt, clippy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=python $(BIN)/python -m mypy.stubtest octavo._core --concise
	cargo fmt --check
	cargo clippy --release --all-targets --features python -- -D warnings

fmt: dev ## format Python and Rust
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cargo fmt

bench: $(VENV)/.built ## scheduler micro-benchmark, then the batching comparison on the default model
	cargo bench --bench scheduler
	$(BIN)/octavo bench batching

dist: dev ## the wheel, in dist/
	$(BIN)/maturin build --release --out dist

clean: ## remove what was built
	rm -rf $(VENV) target dist python/octavo/_core*.so

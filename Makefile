# `make help` lists what there is. Everything works from a clean clone: each target makes what it needs first.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# Debian's own interpreter where it is new enough: a version manager's costs more at every start.
PYTHON ?= $(shell /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo /usr/bin/python3 || echo python3)
VENV := .venv
PY := $(VENV)/bin/python

CORE := $(wildcard shimcore/core/*.c)
HEADERS := $(wildcard shimcore/core/*.h)
CYTHON := $(wildcard shimcore/*.pyx shimcore/*.pxd)
PROGRAMS := $(wildcard shimcore/launcher/*.c shimcore/rig/*.[ch])
CFLAGS_CORE := -std=gnu11 -D_GNU_SOURCE= -Wall -Wextra -Werror -pthread -Ishimcore/core

SHIM := containerd-shim-runc-v2-py
ARGS ?=

.PHONY: help deps build run test lint shim sanitize protos bench bench-start bench-weight bench-exits bench-ttrpc matrix trials clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## install what the machine lacks (Debian packages; Python packages into .venv)
	@tools/deps
	@$(MAKE) -s --no-print-directory $(VENV)/.deps

# Only the dependencies: the package itself is built in place, and found through the .pth file.
$(VENV)/.deps: pyproject.toml tools/requirements.py
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing Python packages into $(VENV)"
	$(PY) tools/requirements.py pyproject.toml >$(VENV)/requirements.txt
	$(PY) -m pip install -q --disable-pip-version-check -r $(VENV)/requirements.txt
	@echo "$(CURDIR)" >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shimcore.pth"
	@touch $@

build: deps ## compile the C core and its two modules in place
	@$(MAKE) -s --no-print-directory build/.built

# Kept apart from `build`, so that make compares times only after deps has made the virtual environment.
build/.built: setup.py $(CORE) $(HEADERS) $(CYTHON) $(PROGRAMS)
	@mkdir -p build
	@echo "compiling the core and its modules"
	$(if $(CI),SHIMCORE_WERROR=1) $(PY) setup.py -q build_clib build_ext --inplace
	@touch $@

run: build ## run a real container under our shim, without containerd, and say what happened
	@$(PY) -m shimcore.install --dest build/shim
	@$(PY) -m shimcore.rig run --shim build/shim/$(SHIM) $(ARGS)

test: build ## all tests, those under the real containerd included (ARGS="-k name" chooses)
	@$(PY) -m pytest $(ARGS)

lint: deps ## ruff, mypy --strict, and the C core with warnings as errors
	@$(PY) -m ruff check .
	@$(PY) -m mypy --strict shimcore
	@$(PY) tools/gen_protos.py --check
	@$(if $(CORE),$(CC) $(CFLAGS_CORE) -O2 -fsyntax-only $(CORE) $(wildcard shimcore/launcher/*.c))

shim: build ## make shim DEST=DIR: put an executable containerd-shim-runc-v2-py in DIR
	@test -n "$(DEST)" || { echo "usage: make shim DEST=DIR" >&2; exit 2; }
	@$(PY) -m shimcore.install --dest "$(DEST)"

# Each tests/c/test_*.c is a program of its own, linked with the whole core; it passes if it exits with 0. What a sanitiser
# reports (99) has failed for good; a check that fails on a busy machine gets one more chance, and is named.
SAN := build/sanitize
SAN_FLAGS := $(CFLAGS_CORE) -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SAN_OBJECTS := $(CORE:shimcore/core/%.c=$(SAN)/core/%.o)
SAN_TESTS := $(patsubst tests/c/%.c,$(SAN)/%,$(wildcard tests/c/test_*.c))

$(SAN)/core/%.o: shimcore/core/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(SAN_FLAGS) -c $< -o $@

$(SAN)/test_%: tests/c/test_%.c $(SAN_OBJECTS) $(wildcard tests/c/*.h)
	@mkdir -p $(@D)
	$(CC) $(SAN_FLAGS) $< $(SAN_OBJECTS) $(LINK_$*) -o $@

# What the model decides itself: when a process dies, and when a record is written.
LINK_model := -Wl,--wrap=sc_record,--wrap=sc_pidfd_open,--wrap=kill

.SECONDARY: $(SAN_OBJECTS)
sanitize: ## the C core's tests, and its fuzz targets for SAN_FUZZ_TIME seconds each, under the address and undefined-behaviour sanitisers
	@tools/deps
	@$(MAKE) -s --no-print-directory $(SAN)/.passed

# The fuzz targets without libFuzzer, so many seconds each.
SAN_FUZZ_TIME ?= 10
SAN_FUZZERS := $(patsubst tests/fuzz/%.c,$(SAN)/%,$(wildcard tests/fuzz/fuzz_*.c))

$(SAN)/fuzz_%: tests/fuzz/fuzz_%.c tests/fuzz/standalone.c $(SAN_OBJECTS)
	@mkdir -p $(@D) build/fuzz
	$(CC) $(SAN_FLAGS) $< tests/fuzz/standalone.c $(SAN_OBJECTS) -o $@

$(SAN)/.passed: $(SAN_TESTS) $(SAN_FUZZERS)
	@mkdir -p $(@D)
	@test -n "$(SAN_TESTS)" || echo "no tests/c/test_*.c"
	@export ASAN_OPTIONS=exitcode=99 UBSAN_OPTIONS=exitcode=99; \
	failed=0; for one in $(SAN_TESTS); do \
		code=0; timeout 300 $$one || code=$$?; \
		case $$code in 0|99) ;; *) echo "UNSTEADY $$one: $$code, once more"; code=0; timeout 300 $$one || code=$$?;; esac; \
		if [ $$code = 0 ]; then echo "PASS $$one"; else echo "FAIL $$one: $$code"; failed=1; fi; \
	done; \
	for one in $(SAN_FUZZERS); do \
		timeout 300 $$one tests/fuzz/corpus/$${one##*/fuzz_} $(SAN_FUZZ_TIME) || { echo "FAIL $$one: $$?"; failed=1; }; \
	done; exit $$failed

protos: deps ## generate the protobuf modules from the .proto files in shimcore/protos
	@$(PY) tools/gen_protos.py

bench: build ## time our shim beside the stock one, in one run
	@$(PY) -m shimcore.install --dest build/shim
	@$(PY) benchmarks/lifecycle.py --shim build/shim/$(SHIM) $(ARGS)

bench-start: build ## start, delete and containers/s of our shim, warm and plain, beside Go's and Rust's
	@$(PY) -m shimcore.install --dest build/shim
	@$(PY) -m benchmarks.start $(ARGS)

bench-weight: build ## memory, threads and fds of live shims, ours beside Go's and Rust's (ARGS="--alive 1 50 --execs 10000")
	@$(PY) -m shimcore.install --dest build/shim
	@$(PY) -m benchmarks.weight $(ARGS)

bench-exits: build ## from the death of a process to its event on containerd's socket, ours beside a bare C loop, Go and Rust
	@$(PY) -m benchmarks.exit_latency $(ARGS)

bench-ttrpc: build ## ttrpc servers under one load: ours with a Python handler, Go's, and a bare C loop
	@$(PY) -m benchmarks.ttrpc $(ARGS)

.PHONY: bench-ttrpc-clients
bench-ttrpc-clients: build ## ttrpc clients on one bare C server: ours, Go's and Rust's
	@$(PY) -m benchmarks.ttrpc.clients $(ARGS)

.PHONY: docs
DOCS := build/docs-venv
docs: build ## the documentation's site, from docs/*.md and the docstrings, in build/site
	@test -x $(DOCS)/bin/mkdocs || { $(PYTHON) -m venv $(DOCS) && \
		$(DOCS)/bin/pip install -q --disable-pip-version-check 'mkdocs>=1.6,<2' 'mkdocs-material>=9.5' 'mkdocstrings-python>=1.16'; }
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build -q --strict
	@! grep -rl '```' build/site --include='*.html' || { echo "these pages show the fences of a code block"; exit 1; }
	@echo "the site is in build/site"

MATRIX ?= v1.7.35 v2.1.9 v2.4.2
matrix: build ## the containerd suite under Debian's containerd and newer ones (MATRIX="v2.4.2 …", needs Go); writes docs/matrix.md
	@tools/deps containernetworking-plugins
	@$(PY) tools/matrix.py $(MATRIX)

.PHONY: cri
cri: build ## pods through CRI, by crictl, under the containerds of the matrix (needs Go)
	@tools/deps containernetworking-plugins
	@$(PY) tools/matrix.py --cri $(MATRIX)

.PHONY: interop
interop: build ## our ttrpc client and server with Go's and Rust's (needs Go and cargo); writes docs/interop.md
	@$(PY) tools/interop.py

.PHONY: bench-info
bench-info: build ## -info beside that of containerd 2.x's own shim, which `make matrix` builds (PEER=FILE: another)
	@$(PY) -m shimcore.install --dest build/shim
	@$(PY) -m benchmarks.info --peer $(or $(PEER),build/matrix/$(lastword $(MATRIX))/bin/containerd-shim-runc-v2) $(ARGS)

.PHONY: wheels
wheels: deps ## build wheels with zig and try them (ARGS="--suite trixie": with that Debian's interpreters too)
	@$(PY) tools/wheels.py $(ARGS)

.PHONY: churn
churn: build ## thousands of short lives with calls given up at random, about 5 minutes (ARGS="--count N --seed S", --help; ARGS=--containerd: through the real one)
	@$(PY) tools/churn.py $(ARGS)

# The stock shim is Debian's; Rust's: cargo install containerd-runc-shim --root DIR.
PEERS ?= stock=/usr/bin/containerd-shim-runc-v2
.PHONY: compare
compare: build ## the same trials against other shims (PEERS="name=path@generation …"); writes docs/comparison.md
	@$(PY) tools/compare.py $(PEERS)

.PHONY: vm-test
vm-test: build ## the tests that want cgroup v2 alone, in a Debian guest under qemu, by runc and by crun (ARGS="tests/vm -k oom")
	@tools/deps qemu-system-x86 debootstrap e2fsprogs
	@$(PY) tools/vm/run.py $(if $(ARGS),-- $(ARGS),--page docs/cgroups.md)

trials: build ## as test, with the bounds on time asserted too
	@SHIMCORE_TRIALS=1 $(PY) -m pytest -m trial $(ARGS)

clean: ## remove what was built, the virtual environment too
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache
	rm -f shimcore/*.so shimcore/_*.c
	find shimcore tests benchmarks examples tools -name __pycache__ -prune -exec rm -rf {} +

# Each tests/fuzz/fuzz_*.c is a libFuzzer program of its own. The kept corpus is only read; what is new goes to build/fuzz.
FUZZ_TIME ?= 60
FUZZERS := $(patsubst tests/fuzz/%.c,build/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))

build/fuzz/fuzz_%: tests/fuzz/fuzz_%.c $(CORE) $(HEADERS)
	@mkdir -p build/fuzz/corpus/$*
	clang $(CFLAGS_CORE) -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $< $(CORE) -o $@

.PHONY: fuzz
fuzz: $(FUZZERS) ## libFuzzer on the C core's parsers and its server, FUZZ_TIME seconds each (needs clang)
	@for one in $(FUZZERS); do \
		name=$${one##*/fuzz_}; mkdir -p build/fuzz/corpus/$$name; \
		$$one -max_total_time=$(FUZZ_TIME) -max_len=65536 -artifact_prefix=build/fuzz/ \
			build/fuzz/corpus/$$name tests/fuzz/corpus/$$name || exit 1; \
	done

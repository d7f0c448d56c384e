# Everything happens in virtual environments inside the checkout; stamp files make a second run cheap.
PYTHON  ?= python3
BIN     := .venv/bin
OLDEST  := .venv-oldest/bin
PYTEST  := HYPOTHESIS_PROFILE=ci HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
RUST    := $(shell find rust -name '*.rs') $(wildcard rust/*/Cargo.toml) Cargo.toml Cargo.lock
export CARGO_TERM_COLOR ?= never

.PHONY: fuzz demo test lint bench bench-ann build wheel test-rust test-python test-oldest check-neon miri sanitize clean loom endurance
.DELETE_ON_ERROR:

build: .venv/.built

demo: build
	$(BIN)/icecache demo $(ARGS)

test: lint test-rust test-oldest test-python

bench: build
	cargo run -q --release -p icecache-core --features bench --example ratios -- 36864 307200
	cargo run -q --release -p icecache-core --example paper
	cargo run -q --release -p icecache-core --features bench --example kernels
	cargo run -q --release -p icecache-core --example scaling
	cargo bench -q -p icecache-core --features bench --bench search -- --quick
	benches/rust/instructions.sh
	$(BIN)/python benches/python/bench_mass.py
	$(BIN)/python benches/python/bench_mass.py curve --tokens 307200 --queries 24

# Other nearest-neighbour libraries beside ours; hours, resumes. The vectors stay outside the checkout.
ANN_CACHE ?= $(HOME)/.cache/icecache-ann
bench-ann: build .venv-ann/.installed
	$(BIN)/python benches/python/bench_ann.py prepare --cache $(ANN_CACHE)
	for part in run pairs stream; do \
		PYTHONPATH=python .venv-ann/bin/python benches/python/bench_ann.py $$part --cache $(ANN_CACHE) --out $(ANN_CACHE)/out || exit 1; \
	done
	$(BIN)/python benches/python/bench_ann.py report --out $(ANN_CACHE)/out --save benches/results/ann

.venv-ann/.installed: benches/requirements-ann.txt
	$(PYTHON) -m venv .venv-ann
	.venv-ann/bin/pip install -q --disable-pip-version-check -r $<
	touch $@

lint: build
	cargo fmt --all --check
	cargo clippy -q --workspace --all-targets -- -D warnings
	$(BIN)/ruff format --check -q python kernels tests benches
	$(BIN)/ruff check -q python kernels tests benches
	$(BIN)/mypy
	$(PYTEST) $(BIN)/python -m pytest tests/python/structure

# Random operations against a map, and damaged files: cargo-fuzz where it is installed (`cargo install cargo-fuzz` and a
# nightly toolchain), else the same targets on random bytes. FUZZ_SECONDS per target.
FUZZ_SECONDS ?= 60
fuzz:
	@if cargo +nightly fuzz --version >/dev/null 2>&1; then \
		for target in operations loader; do mkdir -p fuzz/target/$$target && \
			cargo +nightly fuzz run $$target fuzz/target/$$target fuzz/corpus/$$target -- \
				-max_total_time=$(FUZZ_SECONDS) -max_len=400 -timeout=60 || exit 1; done; \
	else FUZZ_SECONDS=$(FUZZ_SECONDS) cargo test -q -p icecache-core --test properties fuzz:: -- --nocapture; fi

test-rust:
	cargo test -q --workspace --exclude icecache-py
	cargo test -q -p icecache-core --features stress --test stress

# The concurrent protocol under the model checker (minutes), with each ordering weakened in turn.
loom:
	RUSTFLAGS="--cfg loom" cargo test -q --release -p icecache-core --lib --target-dir target/loom loom_models -- --test-threads=$(WORKERS)
	RUSTFLAGS="--cfg loom" cargo test -q --release -p icecache-engine --lib --target-dir target/loom claims

# Parts of the core under an interpreter that checks every access. Needs a nightly toolchain with miri and rust-src. std::arch is left out: kernels
# are those of `scalar`. The packing thread is not joined, hence the leaks. It executes some 40,000 basic blocks a second: sizes are smaller there
# (`cfg!(miri)`), and MIRIFLAGS=-Zmiri-report-progress=1000000 says where it is. Left to itself its `ln` is off by a random ulp, which `validate`,
# computing summaries again, reports.
MIRI := ICECACHE_SIMD=scalar cargo +nightly miri test -q --target-dir target/miri -p icecache-core --features stress
miri: export MIRIFLAGS += -Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-tree-borrows -Zmiri-deterministic-floats
miri:
	$(MIRI) --lib -- free:: retire:: background::
	$(MIRI) --test small

# Unit tests of the core on NEON, in an emulator. Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user.
NEON := aarch64-unknown-linux-gnu
check-neon:
	rustup target add $(NEON)
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
		CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
		cargo test -q --target $(NEON) -p icecache-core --lib

# Every kernel under CUDA's memory checker; needs a GPU and compute-sanitizer. The first run compiles.
sanitize: build
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(BIN)/python tests/python/kernels/launch_all.py
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 $(BIN)/python tests/python/kernels/launch_all.py

# Ten million random operations from four threads (minutes).
endurance:
	cargo test -q --release -p icecache-core --features stress --test stress -- --ignored
	cargo test -q --release -p icecache-core --test properties -- --ignored ten_million

test-python: build
	$(PYTEST) $(BIN)/python -m pytest -n $(WORKERS) --ignore tests/python/structure

# The seam and the models on the oldest supported torch and transformers.
test-oldest: build .venv-oldest/.installed
	PYTHONPATH=python $(PYTEST) $(OLDEST)/python -m pytest -n $(WORKERS) tests/python/models

.venv/.installed: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv-oldest/.installed: requirements-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/pip install -q --disable-pip-version-check -r requirements-oldest.txt
	touch $@

.venv/.built: .venv/.installed $(RUST) pyproject.toml
	PATH=$(CURDIR)/$(BIN):$$PATH VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/maturin develop --release -q >.venv/build.log 2>&1 \
		|| { cat .venv/build.log; exit 1; }
	touch $@

wheel: .venv/.installed
	$(BIN)/maturin build --release -q --out dist

clean:
	rm -rf target dist .venv .venv-oldest python/icecache/_core*.so

#!/bin/sh
# Instructions of the stages of a search, counted by callgrind: the same on a busy machine.
# valgrind knows no AVX-512, so the set is avx2 or scalar. Usage: benches/rust/instructions.sh [avx2|scalar]
set -eu
export ICECACHE_SIMD="${1:-avx2}"
cargo build -q --release -p icecache-core --features bench --example instructions
counts=$(mktemp)
trap 'rm -f "$counts"' EXIT
valgrind -q --tool=callgrind --callgrind-out-file="$counts" \
    "${CARGO_TARGET_DIR:-target}/release/examples/instructions" >/dev/null 2>&1
# Inclusive costs of the functions stage_*, over their ten calls; each also appears as a caller of others.
callgrind_annotate --inclusive=yes --auto=no --threshold=100 "$counts" | tr -d , |
    sed -n 's/^ *\([0-9]*\) .*:instructions::stage_\([a-z0-9_]*\).*/\2 \1/p' |
    awk '$2 > most[$1] { most[$1] = $2 } END { for (stage in most) print stage, most[stage] }' | sort |
    while read -r stage total; do
        echo "{\"isa\":\"$ICECACHE_SIMD\",\"stage\":\"$stage\",\"keys\":16384,\"instructions\":$((total / 10))}"
    done

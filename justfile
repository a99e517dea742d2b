# The verbs of this repository. `just` lists them; dev/test is what CI runs.

_list:
    @just --list --unsorted

# Formats every file.
fmt:
    cargo fmt --all

# Compiler and clippy warnings are errors.
lint:
    cargo clippy --workspace --all-targets -- -D warnings

# Builds the documentation and opens it.
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features --open

# Runs the benchmarks: just bench, just bench --bench instructions.
bench *arguments:
    cargo bench -p eventbus {{ arguments }}

# What CI runs: just test, just test quick, just test --long.
test *arguments:
    dev/test {{ arguments }}

# Licences and advisories, changed contracts, spelling, all pairs of features; fails while a tool is missing.
release-check:
    #!/usr/bin/env bash
    set -uo pipefail
    undone=()

    # check NAME PROGRAM INSTALL COMMAND…: runs the command if the program is there, says how to get it if not.
    check() {
        local name=$1 program=$2 install=$3
        shift 3
        printf '\n==> %s\n' "$name"
        if ! command -v "$program" >/dev/null; then
            echo "$program is not installed: $install"
            undone+=("$name (not installed)")
        elif ! "$@"; then
            undone+=("$name")
        fi
    }

    check deny cargo-deny "cargo install --locked cargo-deny" \
        cargo deny check
    check typos typos "cargo install --locked typos-cli" \
        typos
    check hack cargo-hack "cargo install --locked cargo-hack" \
        cargo hack check --workspace --feature-powerset --depth 2 --no-dev-deps

    # Only a release that exists can be broken.
    release=$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null || true)
    if [[ -n $release ]]; then
        check semver cargo-semver-checks "cargo install --locked cargo-semver-checks" \
            cargo semver-checks --workspace --baseline-rev "$release"
    else
        printf '\n==> semver\nno tag v*: there is no release to compare with\n'
    fi

    printf '\n'
    if ((${#undone[@]} > 0)); then
        printf 'release-check: not passed: %s\n' "${undone[@]}"
        exit 1
    fi
    echo "release-check: passed"

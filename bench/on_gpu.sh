#!/usr/bin/env bash
# Runs all tests and every benchmark case on a machine with one GPU, in under nine minutes.
#
#   bench/on_gpu.sh OUTDIR [--sanitize]
#
# Needs Python 3.11+ with torch, triton and pytest, and nothing else: no network, and onepass need
# not be installed. Results, at most eight files, go to OUTDIR; compiler caches go to a temporary
# folder that is removed at the end. A stage that fails or runs out of time does not stop the next;
# the exit status is 1 if any did, 2 for a wrong invocation. Last come the tables of the benchmark:
# medians, then the roofline with measured / predicted.
# --sanitize also runs each kernel once under compute-sanitizer, in time taken from the others.
# PYTHON names another interpreter, TESTS other tests than all, BENCH_FLAGS further flags of
# onepass.bench; TEST_SECONDS, BENCH_SECONDS, SANITIZE_SECONDS and JOBS (test processes at a time,
# where pytest-xdist is there) change the stages' shares.
set -uo pipefail

usage() {
    echo "on_gpu.sh: $1" >&2
    echo "  usage: bench/on_gpu.sh OUTDIR [--sanitize]" >&2
    exit 2
}

out=""
sanitize=0
for argument in "$@"; do
    case "$argument" in
        --sanitize) sanitize=1 ;;
        -*) usage "unknown option '$argument'; allowed: --sanitize" ;;
        *)
            [ -z "$out" ] || usage "unexpected argument '$argument' after OUTDIR '$out'"
            out="$argument"
            ;;
    esac
done
[ -n "$out" ] || usage "got no OUTDIR"
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || usage "cannot write to OUTDIR '$out'"
out="$(cd "$out" && pwd)"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1

python="${PYTHON:-python3}"
command -v "$python" >/dev/null || usage "no '$python'; name a Python 3.11+ in PYTHON"
test_seconds="${TEST_SECONDS:-$((sanitize ? 200 : 240))}"
bench_seconds="${BENCH_SECONDS:-$((sanitize ? 190 : 240))}"
sanitize_seconds="${SANITIZE_SECONDS:-120}"

cache="$(mktemp -d "${TMPDIR:-/tmp}/onepass.XXXXXX")" || exit 1
trap 'rm -rf "$cache"' EXIT
export PYTHONPATH="$root/python${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export XDG_CACHE_HOME="$cache/xdg" MPLCONFIGDIR="$cache/matplotlib" HF_HOME="$cache/hf"
export HYPOTHESIS_STORAGE_DIRECTORY="$cache/hypothesis" CUDA_CACHE_PATH="$cache/cuda"
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 NO_COLOR=1
unset TRITON_INTERPRET ONEPASS_IMPL

has() { "$python" -c "import $1" >/dev/null 2>&1; }

failed=0
record() { # NAME STATUS SECONDS
    local verdict="passed"
    case "$2" in
        0) ;;
        124 | 137) verdict="out of time" failed=1 ;;
        *) verdict="failed ($2)" failed=1 ;;
    esac
    printf '%-10s %-14s %4d s\n' "$1" "$verdict" "$3" | tee -a "$out/status.txt"
}

stage() { # NAME SECONDS LOG COMMAND...
    local name="$1" limit="$2" log="$3" begun=$SECONDS status
    shift 3
    echo "== $name (at most $limit s)"
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$log" 2>&1
    status=$?
    record "$name" "$status" $((SECONDS - begun))
}

: >"$out/status.txt"
{
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader 2>/dev/null
    "$python" -m onepass env --full
} >"$out/environment.txt" 2>&1

tests=(-q -rfE -p no:cacheprovider -p support.failures_at_once --tb=short --durations=15)
export ONEPASS_FAILURES="$cache/failures" # kept where the stage runs out of time
# Settings of pyproject.toml that belong to plugins which may be missing here.
has pytest_timeout || tests+=(-o timeout= -W "ignore::pytest.PytestConfigWarning")
has pytest_benchmark && tests+=(-p no:benchmark)
if has xdist; then # compiling kernels is work for the CPU: spread it
    tests+=(-n "${JOBS:-6}" --dist worksteal)
fi
if ! has hypothesis; then
    while IFS= read -r file; do
        grep -q importorskip "$file" || tests+=("--ignore=$file")
    done < <(grep -lE '^(from|import) hypothesis' tests/*.py)
fi
PYTHONPATH="$root/tests:$PYTHONPATH" stage tests "$test_seconds" "$out/tests.log" \
    "$python" -m pytest "${tests[@]}" ${TESTS:-tests}
cat "$cache/failures" >>"$out/tests.log" 2>/dev/null
tail -n 15 "$out/tests.log"

if [ "$sanitize" = 1 ]; then
    # Without the caching allocator every tensor is an allocation of its own, with bounds to check.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage sanitize "$sanitize_seconds" "$out/sanitize.log" \
        compute-sanitizer --tool memcheck --error-exitcode 3 --log-file "$cache/sanitizer.txt" \
        "$python" -m onepass.bench.each_kernel
    cat "$cache/sanitizer.txt" >>"$out/sanitize.log" 2>/dev/null
    tail -n 5 "$out/sanitize.log"
fi

plot=()
has matplotlib && plot=(--plot "$out/bench.png")
bench_limit=$((bench_seconds - 20)) # the last size it starts has this long to end
[ "$bench_limit" -gt 5 ] || bench_limit=5
begun=$SECONDS
echo "== bench (at most $bench_seconds s)"
timeout --kill-after=10 "$bench_seconds" "$python" -m onepass.bench --device cuda \
    --output "$out" --time-limit "$bench_limit" "${plot[@]}" ${BENCH_FLAGS:-} >"$out/bench.txt" 2>"$out/bench.log"
record bench "$?" $((SECONDS - begun))
tail -n 5 "$out/bench.log"

echo
cat "$out/status.txt"
echo
# The summary and the roofline: the last tables of the file.
awk '/^milliseconds, median/ { found = 1 } found' "$out/bench.txt"
exit "$failed"

#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes, into bench/results/, each file with the device's name.
#
#   bash bench/gpu.sh                  # SD 1.5's architecture with random weights at 512 px: nothing to download
#   bash bench/gpu.sh --smoke          # the small models, on a CPU too: shows that it runs, keeps no result
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup_env.sh
began=$SECONDS
part() {  # run one benchmark if there is time left; a failed one does not end the others
    if [ $((SECONDS - began)) -gt 500 ]; then echo "no time left for: $*"; return; fi
    timeout "$((540 - SECONDS + began))" "$PYTHON" "$@" || { echo "failed: $*" >&2; failed=1; }
}
failed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ "${1-}" = "--smoke" ]; then
    export BENCH_RESULTS=$work/results
    part bench/gpu.py --smoke
    part bench/memory.py --steps 3 --batch-size 2 --only plain "frozen nf4" "nf4, 8-bit, checkpointing all"
    part bench/peer.py --steps 3 --batch-size 2 --repeats 1 --precisions bf16
    part bench/cache.py --only build --clips 16 --repeats 1
    part bench/generation.py --only time --steps 2 --repeats 1
    exit "$failed"
fi
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: torch sees no GPU here; bash bench/gpu.sh --smoke runs on a CPU, bash bench/run.sh is for CPUs" >&2
    exit 2
}
sd15="--sd15 --models $work/sd15 --image-size 512"
part bench/gpu.py --models "$work/sd15" --seconds 180
part bench/memory.py $sd15 --steps 8 --batch-size 1 --only plain "frozen bf16" "bf16, checkpointing down" "bf16, checkpointing all" \
    "nf4, 8-bit, checkpointing all"
part bench/memory.py $sd15 --steps 8 --batch-size 2 --only plain "frozen bf16"
part bench/peer.py $sd15 --steps 12 --batch-size 4 --repeats 1
part bench/cache.py $sd15 --only build --clips 128 --repeats 1
part bench/generation.py $sd15 --only time --batch-size 4 --precision bf16 --repeats 2
exit "$failed"

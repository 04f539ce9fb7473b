#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes, into bench/results/, each file with the device's name; each is written as
# soon as it is known, the most telling first. Nothing is downloaded but packages.
#
#   bash bench/gpu.sh                  # SD 1.5's architecture with random weights at 512 px
#   PYTHON=python3 bash bench/gpu.sh   # with the packages which that Python has; where one is missing, its rows are left out
#   bash bench/gpu.sh --smoke          # few channels at 64 px, on a CPU too: shows that it runs, keeps no result
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${PYTHON-}" ] || . ./setup_env.sh
began=$SECONDS

absent() {  # which of these modules does the Python not have?
    "$PYTHON" -c 'import sys; from importlib.util import find_spec; print(*(name for name in sys.argv[1:] if not find_spec(name)))' "$@"
}
part() {  # run one benchmark if there is time left; a failed one does not end the others
    if [ $((SECONDS - began)) -gt 500 ]; then echo "no time left for: $*"; return; fi
    timeout "$((540 - SECONDS + began))" "$PYTHON" "$@" || { echo "failed: $*" >&2; failed=1; }
}

missing=$(absent torch diffusers transformers peft safetensors numpy tqdm soundfile soxr PIL)
if [ -n "$missing" ]; then
    echo "error: $PYTHON has no $missing (PIL is the package pillow); install what is missing, or let bash bench/gpu.sh without" \
        "PYTHON= make an environment" >&2
    exit 2
fi
failed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ "${1-}" = "--smoke" ]; then
    export BENCH_RESULTS=$work/results
    models="--small --models $work/models --image-size 64"
    gpu="--batches 2 1 --pairs 5 --block 1" steps=3 clips=16 draw="--steps 2 --repeats 1 --batch-size 2"
else
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "error: torch sees no GPU here; bash bench/gpu.sh --smoke runs on a CPU, bash bench/run.sh is for CPUs" >&2
        exit 2
    }
    models="--sd15 --models $work/models --image-size 512"
    gpu="--seconds 180" steps=6 clips=128 draw="--batch-size 4 --repeats 2"
fi
small=("nf4, 8-bit, checkpointing all")
if [ -n "$(absent bitsandbytes)" ]; then
    echo "no bitsandbytes: the rows of NF4 and 8-bit Adam are left out"
    small=()
fi
part bench/gpu.py $models $gpu
part bench/memory.py $models --steps $steps --batch-size 1 --only plain "frozen bf16" "${small[@]}" \
    "bf16, checkpointing all" "bf16, checkpointing down"
part bench/peer.py $models --steps $steps --batch-size 4 --repeats 1 --precisions bf16 fp32
part bench/memory.py $models --steps $steps --batch-size 2 --only plain "frozen bf16"
part bench/cache.py $models --only build --clips $clips --repeats 1
part bench/generation.py $models --only time --precision bf16 $draw
if [ "${1-}" != "--smoke" ]; then  # last: compiling took over five minutes on the card's machine
    part bench/gpu.py $models $gpu --compile --stages 2 --batches 8
fi
exit "$failed"

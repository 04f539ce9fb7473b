#!/usr/bin/env bash
# Every benchmark that a CPU can do, one after another, into bench/results/ (about two and a half hours on two cores; leave the machine
# alone meanwhile). The tables of docs/ are made from them.
#
#   bash bench/run.sh                  # the table of ways needs the default run: bash run_all_stages.sh
#   bash bench/run.sh --smoke          # everything small, keeps no result
#   SD15=/tmp/sd15 bash bench/run.sh   # keeps the models of SD 1.5's shapes there (5 GB)
#   PUBLISHED=train_text_to_image_lora.py PUBLISHED_PYTHON=.venv-published/bin/python bash bench/run.sh
#       # diffusers' script beside; that Python has requirements.txt, datasets and torchvision
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup_env.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
published=${PUBLISHED:+--published $PUBLISHED}

if [ "${1-}" = "--smoke" ]; then
    export BENCH_RESULTS=$work/results
    "$PYTHON" bench/step.py --pairs 5 --block 1 --batch-size 2 --stages 3
    "$PYTHON" bench/memory.py --steps 3 --batch-size 2 --precision fp32 --only plain "8-bit Adam"
    "$PYTHON" bench/peer.py --steps 3 --batch-size 2 --repeats 1 --precisions fp32
    "$PYTHON" bench/cache.py --clips 16 --rows 2000 --repeats 1 --steps 3
    "$PYTHON" bench/videos.py --clips 20 --seconds 2 --side 64 --repeats 1
    "$PYTHON" bench/startup.py --repeats 1
    "$PYTHON" bench/generation.py --only time --steps 2 --repeats 1
    "$PYTHON" bench/sharing.py
    if "$PYTHON" -c "import gradio" 2>/dev/null; then "$PYTHON" bench/demo.py --smoke; fi  # of requirements-demo.txt
    "$PYTHON" bench/kill_sweep.py --kills 4
    "$PYTHON" bench/long_run.py --steps 100
    exit
fi
sd15="--sd15 --models ${SD15:-$work/sd15}"
"$PYTHON" bench/step.py
"$PYTHON" bench/step.py $sd15 --image-size 128 --batch-size 2 --block 1 --pairs 11
"${PUBLISHED_PYTHON:-$PYTHON}" bench/peer.py --steps 10 --precisions fp32 $published
"${PUBLISHED_PYTHON:-$PYTHON}" bench/peer.py $sd15 --image-size 256 --batch-size 1 --steps 3 $published
"$PYTHON" bench/cache.py
"$PYTHON" bench/videos.py
"$PYTHON" bench/videos.py --clips 20000 --seconds 4
"$PYTHON" bench/startup.py --repeats 5
"$PYTHON" bench/memory.py --batch-size 8 --steps 40 --repeats 5
"$PYTHON" bench/memory.py $sd15 --image-size 512 --batch-size 1 --steps 3 --repeats 5 --only plain "bf16, checkpointing down" \
    "bf16, checkpointing all, batch x 2" "nf4, 8-bit, checkpointing all"
"$PYTHON" bench/memory.py $sd15 --image-size 128 --batch-size 1 --steps 3 --repeats 5 --only plain "frozen bf16" "frozen nf4" "bf16, checkpointing all" \
    "nf4, 8-bit, checkpointing all"
"$PYTHON" bench/generation.py --only time
if [ -e runs/tiny/adapter.safetensors ]; then
    "$PYTHON" bench/generation.py --only ways
    "$PYTHON" bench/sharing.py --run runs/tiny ${SD_SCRIPTS:+--sd-scripts "$SD_SCRIPTS"}
    if "$PYTHON" -c "import gradio" 2>/dev/null; then "$PYTHON" bench/demo.py; fi  # of requirements-demo.txt
else
    echo "no default run under runs/tiny: the table of ways is left out; bash run_all_stages.sh makes one (and bench/generation.py the table)"
fi
"$PYTHON" bench/sharing.py $sd15 ${SD_SCRIPTS:+--sd-scripts "$SD_SCRIPTS"}
"$PYTHON" bench/kill_sweep.py
"$PYTHON" bench/long_run.py

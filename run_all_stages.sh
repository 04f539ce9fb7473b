#!/usr/bin/env bash
# Set up, make the data, train stages 1, 2 and 3, make the pictures and the report, judge them. The same command goes on
# where it stopped; what is finished is skipped.
#
#   bash run_all_stages.sh                                         # the built-in default: CPU, nothing to download
#   bash run_all_stages.sh configs/sd15.json --data-root my_data   # flags go to every stage that knows them
#   bash run_all_stages.sh --tmux [CONFIG] [FLAGS]                 # the same in a tmux session that outlives this terminal
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ "${1-}" = "--help" ] || [ "${1-}" = "-h" ]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
if [ "${1-}" = "--tmux" ]; then
    shift
    command -v tmux >/dev/null || { echo "error: tmux is not installed; run this without --tmux" >&2; exit 2; }
    if tmux has-session -t =clap2diffusion 2>/dev/null; then
        echo "error: a tmux session named clap2diffusion runs already; attach to it: tmux attach -t clap2diffusion" >&2
        exit 2
    fi
    tmux new-session -d -s clap2diffusion "bash run_all_stages.sh ${*:+$(printf '%q ' "$@")}; exec bash" || {
        echo "error: tmux could not start a session (its own words are above); run this without --tmux" >&2
        exit 1
    }
    echo "started in tmux; watch it with: tmux attach -t clap2diffusion"
    exit 0
fi

config=configs/tiny.json
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    config=$1
    shift
fi
if [ ! -f "$config" ]; then
    echo "error: $config: no such config; expected one of $(echo configs/*.json)" >&2
    exit 2
fi

stop() {  # hand the signal on, wait until the stage has saved, leave with its exit code
    local code=0
    child=${child:-$(jobs -pr)}  # a signal may come between its start and the note of its number
    if [ -n "${child-}" ]; then
        kill -s "${hand_on:-$1}" "$child" 2>/dev/null || true
        wait "$child" || code=$?
        if kill -0 "$child" 2>/dev/null; then wait "$child" || code=$?; fi
    fi
    exit "$([ -z "${hand_on-}" ] && [ "$code" -gt 0 ] && echo "$code" || echo "$2")"
}
trap 'stop TERM 143' TERM
trap 'stop INT 130' INT
trap 'stop HUP 129' HUP

hand_on=TERM  # pip in the background ignores SIGINT
. ./setup_env.sh
hand_on=

# every mistake in config or flags shows now, not hours later
plan=$("$PYTHON" tools/plan.py "$config" "$@")
eval "$plan"  # sets RUN and the arrays DATA, EVALUATE, STAGE1, STAGE2, STAGE3, all quoted by Python

if [ "${#DATA[@]}" -gt 0 ]; then run "$PYTHON" prepare_data.py "${DATA[@]}"; fi
run "$PYTHON" train_stage1.py "${STAGE1[@]}"
run "$PYTHON" train_stage2.py "${STAGE2[@]}"
run "$PYTHON" train_stage3.py "${STAGE3[@]}"
run "$PYTHON" evaluate.py --run "$RUN" --device "$DEVICE" "${EVALUATE[@]}"

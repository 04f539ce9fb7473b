#!/usr/bin/env bash
# Set up, make the data, train stages 1, 2 and 3, make the pictures and the report, judge them. The same command goes on
# where it stopped; what is finished is skipped.
#
#   bash run_all_stages.sh                                         # the built-in default: CPU, nothing to download
#   bash run_all_stages.sh configs/sd15.json --data-root my_data   # flags go to every stage that knows them
#   bash run_all_stages.sh configs/vggsound.json --data-root my_vggsound   # from videos and a list of them
#   bash run_all_stages.sh --tmux [CONFIG] [FLAGS]                 # the same in a tmux session that outlives this terminal; its
#                                                                  # second window shows how it goes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ "${1-}" = "--help" ] || [ "${1-}" = "-h" ]; then
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
in_tmux=
if [ "${1-}" = "--tmux" ]; then
    shift
    in_tmux=1
    command -v tmux >/dev/null || { echo "error: tmux is not installed; run this without --tmux" >&2; exit 2; }
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

start_in_tmux() {  # CONFIG [FLAGS]: the same chain in a session of its own. A pane stays when its run has ended
    local panes pane code user folder environment chain stop="tmux kill-session -t clap2diffusion"
    local come_back="tmux attach -t clap2diffusion"
    if [ -n "${TMUX-}" ]; then come_back="tmux switch-client -t clap2diffusion"; fi
    panes=$(tmux list-panes -s -t =clap2diffusion -F '#{pane_dead}|#{pane_dead_status}|#{pane_current_command}|#{session_path}' 2>/dev/null) || panes=
    IFS='|' read -r pane code user folder <<<"${panes%%$'\n'*}"
    if [ "$pane" = 0 ]; then
        echo "error: tmux session clap2diffusion is running ($user in $folder); come back to it: $come_back; stop it: $stop" >&2
        exit 2
    elif [ "$pane" = 1 ]; then
        echo "the run before it, in $folder, has ended${code:+ with exit code $code}; its screen makes room"
        $stop
    fi
    environment=$(mktemp)  # a server that is there already would run this with its own variables
    { (unset TERM TMUX TMUX_PANE; export -p); printf 'set --'; printf ' %q' "$@"; echo; } >"$environment"
    # shellcheck disable=SC2016
    chain=$(tmux new-session -d -P -F '#{pane_pid}' -s clap2diffusion -n chain -c "$PWD" bash -c '. "$0"; rm -f "$0"; exec bash run_all_stages.sh "$@"' "$environment" \; \
        set-option -w -t =clap2diffusion: remain-on-exit on) || {
        rm -f "$environment"
        echo "error: tmux could not start a session (its own words are above); run this without --tmux" >&2
        exit 1
    }
    # a second window, behind the first, that ends with the chain
    tmux new-window -d -a -t =clap2diffusion:=chain -n watch -c "$PWD" \
        "$(command -v "$PYTHON")" tools/watch.py "$RUN" --until "$chain" ||
        echo "no second window to watch it (tmux's own words are above); python tools/watch.py $RUN shows the same" >&2
    printf '%s\n' "started in tmux; it goes on when this terminal is closed" "  come back: $come_back" \
        "  see how it goes: Ctrl-b, then n, for the second window and back" \
        "  leave it running: Ctrl-b, then d" "  stop it, which saves first: $stop"
}

if [ -n "$in_tmux" ]; then
    start_in_tmux "$config" "$@"
    exit
fi
if [ "${#DATA[@]}" -gt 0 ]; then
    for step in "${DATA[@]}"; do
        eval "step=($step)"  # the arguments of one prepare_data.py, quoted by Python as well
        run "$PYTHON" prepare_data.py "${step[@]}"
    done
fi
run "$PYTHON" train_stage1.py "${STAGE1[@]}"
run "$PYTHON" train_stage2.py "${STAGE2[@]}"
"$PYTHON" train_stage3.py "${STAGE3[@]}" &  # not by run, which ends the chain at any other code than 0
child=$! verdict=0
wait "$child" || verdict=$?
child=
no=([3]="the gate settled elsewhere" [4]="the gate walked away" [5]="in the window, the sound is not shown to help")
if [ "$verdict" -gt 0 ]; then
    [ -n "${no[verdict]-}" ] || exit "$verdict"
    echo "stage 3's verdict is no (exit code $verdict): ${no[verdict]}; its adapter is finished and judged now"
fi
run "$PYTHON" evaluate.py --run "$RUN" --device "$DEVICE" "${EVALUATE[@]}"
if [ "$verdict" -gt 0 ]; then
    echo "error: $RUN: all is made and judged, but stage 3's verdict is no: ${no[verdict]}; its figures are above" >&2
    exit "$verdict"
fi

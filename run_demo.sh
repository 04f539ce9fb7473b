#!/usr/bin/env bash
# Set up, then open a page on this machine that makes pictures from sounds with a trained run. Ctrl-c stops it.
#
#   bash run_demo.sh                     # runs/tiny, which bash run_all_stages.sh makes: http://127.0.0.1:7860
#   bash run_demo.sh --run runs/sd15     # another run, stage folder or adapter file
#   bash run_demo.sh --port 8000         # another port; --device cpu|cuda, --precision bf16
#   bash run_demo.sh --host 0.0.0.0      # for other machines of your network too; --share: for everybody who has the link
#
# What the page can do: docs/demo.md. Nothing leaves this machine unless --host or --share says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

run=runs/tiny before=
for flag in "$@"; do
    case $flag in
        --help | -h)
            sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --run=*) run=${flag#--run=} ;;
    esac
    if [ "$before" = --run ]; then run=$flag; fi
    before=$flag
done
if [ ! -e "$run" ]; then  # known before anything is installed
    case $run in /*) where= ;; *) where=" in $PWD" ;; esac
    echo "error: ${run:-''}: no such run$where; expected the folder of a trained one; make the default's runs/tiny with" \
        "bash run_all_stages.sh (about 11 minutes on two CPU cores), or name yours with --run" >&2
    exit 2
fi

REQUIREMENTS=(requirements.txt requirements-demo.txt)
. ./setup_env.sh
exec "$PYTHON" -m clap2diffusion.demo "$@"

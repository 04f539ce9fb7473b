#!/usr/bin/env bash
# Set up as run_all_stages.sh does, then run the tests; arguments go to pytest: bash run_tests.sh -m slow
# Two processes of one thread each: the scripts under test are small, and start-up is most of their time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup_env.sh
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest tests -n 2 --dist loadfile "$@"

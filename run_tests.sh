#!/usr/bin/env bash
# Set up as run_all_stages.sh does, then run the tests; arguments go to pytest: bash run_tests.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup_env.sh
exec "$PYTHON" -m pytest tests "$@"

#!/usr/bin/env bash
# Set up as run_all_stages.sh does, then run the tests; arguments go to pytest.
#
#   bash run_tests.sh                                    # all of them but the long proofs
#   bash run_tests.sh -m slow                            # the long proofs
#   bash run_tests.sh tests/test_house.py -k small       # one file, of it the tests with that word; ::NAME works too
#
# Two processes of one thread each: the scripts under test are small. Each takes a file at a time, long ones first (conftest.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck disable=SC2034
ALSO=(requirements-demo.txt requirements-browser.txt)  # where they are missing, the tests of the page skip
. ./setup_env.sh
exec "$PYTHON" -m pytest -n 2 "$@"

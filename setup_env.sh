# Sourced by run_all_stages.sh and run_tests.sh: sets PYTHON to a Python that has everything in requirements.txt.
# An environment that has it already is used as it is; otherwise .venv is made here and filled.
# By itself, bash setup_env.sh, it does the same and says how to use that Python.
cd "$(dirname "${BASH_SOURCE[0]}")" || exit

satisfied() {  # does this Python have every package of requirements.txt in an accepted version?
    "$1" - requirements.txt >/dev/null 2>&1 <<'PY'
import sys
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement
assert sys.version_info >= (3, 11)
for line in open(sys.argv[1]):
    if text := line.split("#")[0].strip():
        wanted = Requirement(text)
        assert wanted.specifier.contains(version(wanted.name)), wanted
PY
}

find_python() {
    local candidate
    for candidate in .venv/bin/python python3 python; do
        if command -v "$candidate" >/dev/null && satisfied "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    for candidate in python3 python python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null \
            && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            make_venv "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer with the venv module found; install one (Debian: sudo apt-get install -y" \
        "python3 python3-venv) and run this again" >&2
    exit 2
}

child=
run() {  # in the background, since bash only runs a trap between foreground commands
    "$@" &
    child=$!
    wait "$child"
    child=
}

make_venv() {
    echo "setting up .venv with requirements.txt (once)"
    run "$1" -m venv .venv
    PYTHON=.venv/bin/python
    local torch="torch==2.13.0"  # the version everything was run with; requirements.txt accepts others
    if ! nvidia-smi >/dev/null 2>&1; then  # the CPU build is ten times smaller; without it, whatever pip finds
        run "$PYTHON" -m pip install --quiet --disable-pip-version-check --timeout 10 --retries 0 "$torch" \
            --index-url https://download.pytorch.org/whl/cpu >/dev/null 2>&1 || true
    fi
    for wanted in "$torch" "-r requirements.txt"; do
        # shellcheck disable=SC2086
        run "$PYTHON" -m pip install --quiet --disable-pip-version-check $wanted || {
            echo "error: pip could not install $wanted into .venv (its own words are above); mend that and run the same command again" >&2
            exit 1
        }
    done
}

find_python
echo "Python: $("$PYTHON" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    case $PYTHON in
        .venv/*) echo "use it: source $PWD/.venv/bin/activate" ;;
        *) echo "it has everything; use it: $(command -v "$PYTHON") generate.py --help" ;;
    esac
fi

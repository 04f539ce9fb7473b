# Sourced by run_all_stages.sh, run_demo.sh and run_tests.sh: sets PYTHON to a Python that has everything in the files
# of REQUIREMENTS. An environment that has it already is used as it is; otherwise .venv is made here, or gets what it
# lacks. Files in ALSO go into a .venv that is made now; an environment without them is good enough.
# By itself, bash setup_env.sh, it does this for requirements.txt and says how to use that Python.
cd "$(dirname "${BASH_SOURCE[0]}")" || exit
[ -n "${REQUIREMENTS-}" ] || REQUIREMENTS=(requirements.txt)
[ -n "${ALSO-}" ] || ALSO=()

satisfied() {  # PYTHON FILE...: does it have every package of these files in an accepted version?
    "$1" - "${@:2}" >/dev/null 2>&1 <<'PY'
import sys
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement
assert sys.version_info >= (3, 11)
for path in sys.argv[1:]:
    for line in open(path):
        if text := line.split("#")[0].strip():
            wanted = Requirement(text)
            assert wanted.specifier.contains(version(wanted.name)), wanted
PY
}

find_python() {
    local candidate
    for candidate in .venv/bin/python python3 python; do
        if command -v "$candidate" >/dev/null && satisfied "$candidate" "${REQUIREMENTS[@]}"; then
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
end_setup() {  # pip in the background ignores SIGINT
    child=${child:-$(jobs -pr)}  # a signal may come between its start and the note of its number
    [ -z "$child" ] || { kill "$child"; wait "$child"; } 2>/dev/null || true
    exit "$1"
}
if [ -z "$(trap -p TERM)" ]; then  # run_all_stages.sh hands its signals on by itself
    trap 'end_setup 143' TERM
    trap 'end_setup 130' INT
    trap 'end_setup 129' HUP
fi

run() {  # in the background, since bash only runs a trap between foreground commands
    local code=0
    "$@" &
    child=$!
    wait "$child" || code=$?
    child=
    return "$code"
}

make_venv() {  # with this Python, if there is none or it was left half-made
    local torch="torch==2.13.0"  # the version everything was run with; requirements.txt accepts others
    local files=("${REQUIREMENTS[@]}") wanted=() file
    PYTHON=.venv/bin/python
    if "$PYTHON" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "setting up .venv with what it lacks of ${files[*]} (once)"
    else
        files+=(${ALSO[@]+"${ALSO[@]}"})
        echo "setting up .venv with ${files[*]} (once)"
        run "$1" -m venv .venv || {
            echo "error: $PWD/.venv could not be made with $1 (its own words are above); mend that, or put this" \
                "folder where you may write, and run the same command again" >&2
            exit 1
        }
    fi
    if ! satisfied "$PYTHON" requirements.txt; then
        wanted=("$torch")
        if ! nvidia-smi >/dev/null 2>&1; then  # the CPU build is ten times smaller; without it, whatever pip finds
            run "$PYTHON" -m pip install --quiet --disable-pip-version-check --timeout 10 --retries 0 "$torch" \
                --index-url https://download.pytorch.org/whl/cpu >/dev/null 2>&1 || true
        fi
    fi
    for file in "${files[@]}"; do wanted+=(-r "$file"); done
    run "$PYTHON" -m pip install --quiet --disable-pip-version-check "${wanted[@]}" || {
        echo "error: pip could not install ${wanted[*]} into .venv (its own words are above); mend that and run the same command again" >&2
        exit 1
    }
}

find_python
echo "Python: $("$PYTHON" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    case $PYTHON in
        .venv/*) echo "use it: source $PWD/.venv/bin/activate" ;;
        *) echo "it has everything; use it: $(command -v "$PYTHON") generate.py --help" ;;
    esac
fi

"""Feed arbitrary bytes to our readers. Each must give a value or raise our own error, and nothing else.

    python tools/fuzz.py manifest --seconds 600   # or config, or checkpoint; needs: pip install atheris

The search is guided by coverage. tests/test_properties.py runs the same three functions with hypothesis. A
run keeps what it finds in tools/corpus/TARGET, and the tests read it as a case from then on."""

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clap2diffusion  # noqa: F401  (it ends in one sentence where packages are missing)

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("manifest", "config", "checkpoint"))
    parser.add_argument("--seconds", type=int, default=600, help="how long")
    args = parser.parse_args()
    if find_spec("atheris") is None:
        parser.error("this Python lacks atheris, which the tests do not need; pip install atheris")
    import atheris
    sys.path.insert(0, str(ROOT / "tests"))
    with atheris.instrument_imports(include=["clap2diffusion", "json"]):
        from test_properties import CORPUS, TARGETS
    corpus, run = CORPUS / args.target, TARGETS[args.target]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        found, work = Path(temporary) / "found", Path(temporary) / "work"
        found.mkdir()
        work.mkdir()
        atheris.Setup([sys.argv[0], f"-max_total_time={args.seconds}", f"-artifact_prefix={corpus}/",
                       "-max_len=4096", "-timeout=20", str(found), str(corpus)],
                      lambda content: run(content, work))
        atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Which rows of the fault tables notice when the code is broken? A row that never goes red proves nothing.

    python tools/mutants.py data       # sounds, pictures and manifests
    python tools/mutants.py config     # configs, flags and models
    python tools/mutants.py runs       # checkpoints, run folders and disks
    python tools/mutants.py signals    # signals and processes

The project is copied. The copy is broken in one place at a time, and the rows run there. First every `raise`
of the modules in TARGETS is taken out, if a row waits for its words or it has none of its own. For runs,
where a row takes seconds, it must have words. Then the lines of CHANGES are changed. A mutant that turns both
control rows red breaks everything and counts for nothing. A row that was red is not run again."""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from difflib import SequenceMatcher
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clap2diffusion  # noqa: F401  (it ends in one sentence where packages are missing)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
RAISED = "test_what_torch_and_the_system_raise_ends_in_one_sentence"

TARGETS = {  # patterns of the modules whose `raise` is taken out
    "data": ("clap2diffusion/dataset/*.py",), "config": ("clap2diffusion/base/*.py",),
    "runs": ("clap2diffusion/**/*.py", "*.py"), "signals": ()}
CONTROLS = {"data": ("spaces in a name", "silence"), "config": ("a word for a number", "an empty config"),
            "runs": ("the same command again when all is done", "a sound that is missing"),
            "signals": (f"{RAISED}[memory]", f"{RAISED}[disk]")}
# what stands where, what it becomes and, where rows are many, a pattern of those to run
CHANGES = json.loads(Path(__file__).with_name("mutants.json").read_text("utf-8"))


def taken_out(source: str):
    """(where, source, the words it said) for every raise statement."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            said = "".join(part.value for part in ast.walk(node)
                           if isinstance(part, ast.Constant) and isinstance(part.value, str))
            first = lines[node.lineno - 1]
            mutated = [*lines[:node.lineno - 1], first[:node.col_offset] + "pass\n", *lines[node.end_lineno:]]
            yield f"line {node.lineno}: {first.strip()[:90]}", "".join(mutated), said


def mutants(target: str, left: dict[str, str]):
    """(module, what was done, its source, rows that may notice) in turn. left: {row, not red yet: words}."""
    paths = (path for pattern in TARGETS[target] for path in sorted(ROOT.glob(pattern)))
    for module in (path.relative_to(ROOT) for path in paths):
        for where, source, said in taken_out((ROOT / module).read_text("utf-8")):
            matching = {row for row, says in left.items()
                        if SequenceMatcher(None, said, says, False).find_longest_match().size >= 9}
            if matching or not said and target != "runs":
                yield module, where, source, matching or set(left)
    for change in CHANGES[target]:
        module, old, new = change["module"], change["old"], change["new"]
        source = (ROOT / module).read_text("utf-8")
        assert source.count(old) == 1, f"{module}: {old!r} stands there {source.count(old)} times"
        yield (module, f"{old.strip()[:60]} -> {new.strip()[:60]}", source.replace(old, new),
               {row for row in left if re.search(change.get("rows", ""), row)})


def pytest(place: Path, *args: str) -> subprocess.CompletedProcess:
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "1000"}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args], cwd=place,
                          capture_output=True, encoding="utf-8", env=os.environ | more)


def red_rows(place: Path, test: str, rows: set[str]) -> set[str]:
    """The tests that fail there."""
    done = pytest(place, "-rfE", "--tb=no", *(f"{test}::{row}" for row in sorted(rows)))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {row for row in rows
            if re.search(rf"^(?:FAILED|ERROR) {re.escape(f'{test}::{row}')}", done.stdout, re.MULTILINE)}


def share_a_run(made: Path, place: Path) -> None:
    """Let every session in the copy use one run of the unbroken stages. Training takes half a minute."""
    from conftest import ok, script, write_config
    ok(script("prepare_data.py", "world", "--out", made / "world", "--train", 40, "--val", 20, "--test", 10))
    config = write_config(made / "small.json", made / "world", made / "run", made / "cache")
    for stage in (1, 2, 3):
        ok(script(f"train_stage{stage}.py", "--config", config, "--samples", 1))
    fixtures = (f"\n\n@pytest.fixture(scope='session')\ndef {name}():\n    return Path({str(path)!r})\n"
                for name, path in (("world", made / "world"), ("config", config), ("run", made / "run")))
    with (place / "tests/conftest.py").open("a", encoding="utf-8") as file:
        file.writelines(fixtures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS])
    parser.add_argument("--rows", default="", help="a regular expression: only the rows that it finds")
    args = parser.parse_args()
    test = f"tests/test_faults_{args.target}.py"
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "copy"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(
            ".git", ".venv", "runs", "data", "cache", ".cache", "__pycache__", ".pytest_cache"))
        if args.target in ("runs", "signals"):
            share_a_run(Path(temporary), place)
        if args.target == "signals":
            listed = pytest(place, "--collect-only", test).stdout
            rows = dict.fromkeys(re.findall(r"::(test_.*)$", listed, re.MULTILINE), "")
        else:
            cases = import_module(f"test_faults_{args.target}").CASES
            rows = {f"test_case[{case}]": case.says for case in cases}
        controls = {row if row in rows else f"test_case[{row}]" for row in CONTROLS[args.target]}
        rows = {row: says for row, says in rows.items() if re.search(args.rows, row)}
        left, red = dict(rows), {}
        assert not red_rows(place, test, controls), "the controls fail in the unbroken code"
        for module, what, source, rows_now in mutants(args.target, left):
            plain = (place / module).read_text("utf-8")
            (place / module).write_text(source, "utf-8")
            found = red_rows(place, test, rows_now | controls)
            (place / module).write_text(plain, "utf-8")
            # a control that is red itself is judged by the other one
            new = found & left.keys() if controls - found else set()
            for row in new:
                red[row] = f"{module}, {what}"
                del left[row]
            print(f"{module}, {what}: {'breaks everything' if found >= controls else len(new)} ({len(left)} "
                  "left)", flush=True)
    for row, why in sorted(red.items()):
        print(f"red: {row}: {why}")
    for row in sorted(left):
        print(f"NEVER RED: {row}")
    print(f"{len(red)} of {len(rows)} rows were seen red")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()

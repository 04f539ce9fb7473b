"""Which rows of the fault tables notice when the code is broken? A row that never goes red proves nothing.

    python tests/mutants.py data       # the project is copied; the copy is broken in one place at a time and the rows run there
    python tests/mutants.py config
    python tests/mutants.py runs
    python tests/mutants.py signals

Broken are, in turn, every `raise` of the modules below whose words a row waits for, or that has none of its own (it is taken out; for
runs, where a row takes seconds, only the former), and the lines of CHANGES (they are changed). A mutant that
turns both control rows red breaks everything, and counts for nothing. A row that was red is not run again.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from difflib import SequenceMatcher
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TARGETS = {"data": ("data.py", "prepare_data.py"), "config": ("config.py", "pretrained.py"),
           "runs": ("runs.py", "config.py", "features.py", "common.py", "pretrained.py", "generate.py", "stock.py", "evaluate.py", "report.py",
                    "prepare_data.py", "data.py"), "signals": ()}
CONTROLS = {"data": ("spaces in a name", "silence"), "config": ("a word for a number", "an empty config"),
            "runs": ("the same command again when all is done", "a sound that is missing"),
            "signals": ("test_what_torch_and_the_system_raise_ends_in_one_sentence[memory]", "test_what_torch_and_the_system_raise_ends_in_one_sentence[disk]")}
CHANGES = {  # (module, what stands there, what it becomes, and a pattern for the rows to run where they are many)
    "data": [
        ("data.py", "soxr.resample(mono.astype(np.float32), rate, sampling_rate)", "mono.astype(np.float32)"),
        ("data.py", "(block / max(peak, 1.0)).mean(axis=1)", "(block / max(peak, 1.0))[:, 0]"),
        ("data.py", '"float64" if sound.subtype == "DOUBLE" else "float32"', '"float32"'),
        ("data.py", "length = min(total, round(window_s * rate))", "length = total"),
        ("data.py", "sound.seek(total - 1 if", "sound.seek(0 if"),
        ("data.py", 'flags.append("silent")', "pass"),
        ("data.py", 'flags.append("cancelled by the mono mix")', "pass"),
        ("data.py", 'if image.mode.startswith("I"):', "if False:"),
        ("data.py", "ValueError, RuntimeError, EOFError", "ValueError, EOFError", "AVIF"),
        ("data.py", 'Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)', "image"),
        ("data.py", "image = ImageOps.exif_transpose(image)", "pass"),
        ("data.py", "            image.load()\n", '            image.seek(getattr(image, "n_frames", 1) - 1)\n            image.load()\n'),
        ("data.py", 'image = image.convert("RGB")\n            side', 'image = image if image.mode == "CMYK" else image.convert("RGB")\n            side'),
        ("data.py", 'line.removeprefix(b"\\xef\\xbb\\xbf") if number == 1 else line', "line"),
        ("data.py", "                if line.strip():", "                if line.strip(b\"\\n\"):"),
        ("data.py", 'json.loads(line.decode("utf-8"))', 'json.loads(line.decode("utf-8") if line.endswith(b"}\\n") else "no line of ours")'),
        ("data.py", "[name] if name.isascii() else", "[name] or"),
        ("data.py", "name = os.path.normpath(name)", "name = os.path.normpath(name.split()[0])"),
        ("prepare_data.py", "if peak >= 0.98 and", "if False and"),
        ("prepare_data.py", "if seconds < SHORT_CLIP_S:", "if False:"),
        ("prepare_data.py", "if rates:", "if False:"),
        ("prepare_data.py", "if min(width, height) < SMALL_SIDE:", "if False:"),
        ("prepare_data.py", "if max(width, height) > LONG_SHAPE * min(width, height):", "if False:"),
        ("prepare_data.py", "again[path] = earlier", "pass"),
        ("prepare_data.py", "if other.split != row.split:", "if False:"),
        ("prepare_data.py", "if not row.text.strip():", "if False:"),
        ("prepare_data.py", "elif row.label and names_label(row.text, row.label):", "elif False:"),
    ],
    "config": [
        ("config.py", "        if not inside:", "        if False:"),
        ("config.py", "except (UserError, RecursionError, ValueError) as error:", "except UserError as error:"),
        ("config.py", "allow_abbrev=False", "allow_abbrev=True"),
        ("config.py", "    def error(self, message: str):", "    def unused(self, message: str):"),
        ("config.py", 'if isinstance(value, bool) else fail("true or false")', ""),
    ],
    "runs": [
        ("runs.py", "recorded != _digest(header, tensors)", "False", "flipped"),
        ("runs.py", 'path.rename(f"{path}.broken")', "pass", "keep 2"),
        ("runs.py", "for step in reversed(self.steps()):", "for step in self.steps()[-1:]:", "newest"),
        ("runs.py", "            stale.unlink()", "            pass", "temporary"),
        ("runs.py", 'return sorted(int(p.stem[5:]) for p in self.checkpoints.glob("step-" + "[0-9]" * 8 + ".safetensors"))',
         'return [int(p.stem[5:]) for p in sorted(self.checkpoints.glob("step-*.safetensors"), key=os.path.getmtime)]', "times"),
        ("runs.py", 'FREE_SETTINGS = {"run", "name", "workers", "log_every",', 'FREE_SETTINGS = {"run", "name", "workers",', "interval"),
        ("runs.py", "if changed and not allow_changed:", "if changed:", "allowed|fewer steps"),
        ("runs.py", "                    folder.rename(backup)", "                    import shutil; shutil.rmtree(folder)", "fresh"),
        ("runs.py", "            group.update(", "            dict().update(", "weight decay"),
        ("runs.py", "or not self.final.exists():", "or False:", "result lost"),
        ("runs.py", "        except Broken as error:\n            print(f\"{error}; the weights", "        except ZeroDivisionError as error:\n            print(f\"{error}; the weights", "best"),
        ("runs.py", '"[0-9]" * 8', '"*"', "name of the user's"),
        ("report.py", "except data.BadFile as error:", "except ZeroDivisionError as error:", "report after"),
        ("evaluate.py", "except data.BadFile as error:", "except ZeroDivisionError as error:", "judging after"),
        ("runs.py", "        return True\n\n    def steps", "        return False\n\n    def steps", "same command"),
        ("runs.py", "except OSError as error:\n                print(f\"{self.path(old)}", "except PermissionError as error:\n                print(f\"{self.path(old)}", "deleted"),
        ("runs.py", 'if header["fingerprints"] != fingerprints:', 'if header["fingerprints"] != fingerprints or header["settings"]["precision"] != "fp32":', "BF16"),
        ("train_stage1.py", "if step >= cfg.steps:", "if step == cfg.steps:", "fewer steps"),
        ("features.py", "except (OSError, SafetensorError, ValueError, RecursionError):", "except OSError:", "shard"),
        ("features.py", "if len(bad) > limit * total:", "if bad:", "bad rows"),
        ("common.py", "finite = bool(torch.isfinite(loss + grad_norm))", "finite = True", "NaN"),
    ],
    "signals": [
        ("config.py", "        signal.signal(signum, _raise_stopped)\n    if", "        pass\n    if", "phase|lost"),
        ("config.py", "sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)", "pass", "reads|terminal"),
        ("runs.py", "if self.signum and kind is None:", "if False:", "lost"),
        ("config.py", "                child.kill()", "                pass", "ignores"),
        ("config.py", "signal.setitimer(signal.ITIMER_REAL, 0.5)", "pass", "lost"),
        ("config.py", "        os.kill(os.getpid(), came[0])", "        pass", "lost"),
        ("config.py", 'if type(error).__name__ == "OutOfMemoryError":', "if False:", "sentence"),
        ("config.py", "elif error.errno in DISK_FULL:", "elif False:", "sentence"),
        ("runs.py", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "two_runs"),
        ("runs.py", "os._exit(128 + signum)", "pass", "second"),
        ("runs.py", "            if parallel.first():\n                with contextlib", "            os._exit(3)\n            if parallel.first():\n                with contextlib", "save"),
        ("features.py", 'if "DataLoader worker (pid" not in str(error):', "if True:", "loader"),
        ("config.py", '"DataLoader worker (pid" in str(error)', "False", "loader"),
        ("prepare_data.py", "except BrokenProcessPool:", "except ZeroDivisionError:", "process_of_the_data"),
        ("run_all_stages.sh", "    local code=0\n", "    return\n    local code=0\n", "set_up"),
        ("train_stage1.py", "with runs.StopSignal() as stop,", "import types, contextlib; stop = types.SimpleNamespace(signum=0)\n    with contextlib.nullcontext(),", "step|save|validation"),
        ("train_stage3.py", "with runs.StopSignal() as stop,", "import types, contextlib; stop = types.SimpleNamespace(signum=0)\n    with contextlib.nullcontext(),", "sweep"),
    ]}


def taken_out(source: str):
    """(where, source, the words it said) for every raise statement."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            said = "".join(part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))
            first = lines[node.lineno - 1]
            mutated = [*lines[:node.lineno - 1], first[:node.col_offset] + "pass\n", *lines[node.end_lineno:]]
            yield f"line {node.lineno}: {first.strip()[:90]}", "".join(mutated), said


def mutants(target: str, left: dict[str, str]):
    """(module, what was done, its source, rows that may notice) in turn; `left`: the rows that were not red yet and their sentences."""
    for module in TARGETS[target]:
        for where, source, said in taken_out((ROOT / module).read_text()):
            matching = {row for row, says in left.items() if SequenceMatcher(None, said, says, False).find_longest_match().size >= 9}
            if matching or not said and target != "runs":
                yield module, where, source, matching or set(left)
    for module, old, new, *pattern in CHANGES[target]:
        source = (ROOT / module).read_text()
        assert source.count(old) == 1, f"{module}: {old!r} stands there {source.count(old)} times"
        yield module, f"{old.strip()[:60]} -> {new.strip()[:60]}", source.replace(old, new), {row for row in left if re.search("".join(pattern), row)}


def red_rows(place: Path, test: str, rows: set[str]) -> set[str]:
    """The tests that fail there."""
    done = pytest(place, "-rfE", "--tb=no", "-m", "not slow", *(f"{test}::{row}" for row in sorted(rows)))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {row for row in rows if re.search(rf"^(?:FAILED|ERROR) {re.escape(f'{test}::{row}')}", done.stdout, re.MULTILINE)}


def pytest(place: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args], cwd=place, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"})


def share_a_run(made: Path, place: Path) -> None:
    """Let every session in the copy use one run of the unbroken stages, since each mutant would train its own for half a minute."""
    from conftest import ok, script, write_config
    ok(script("prepare_data.py", "world", "--out", made / "world", "--train", 40, "--val", 20, "--test", 10))
    config = write_config(made / "small.json", made / "world", made / "run", made / "cache")
    for stage in (1, 2, 3):
        ok(script(f"train_stage{stage}.py", "--config", config))
    fixtures = (f"\n\n@pytest.fixture(scope='session')\ndef {name}():\n    return Path({str(path)!r})\n"
                for name, path in (("world", made / "world"), ("config", config), ("run", made / "run")))
    with (place / "tests/conftest.py").open("a") as file:
        file.writelines(fixtures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS])
    parser.add_argument("--rows", default="", help="a regular expression: only the rows that it finds")
    args = parser.parse_args()
    test = f"tests/test_faults_{args.target}.py"
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "copy"
        for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
        if args.target in ("runs", "signals"):
            share_a_run(Path(temporary), place)
        if args.target == "signals":
            listed = pytest(place, "--collect-only", "-m", "not slow", test).stdout
            rows, controls = dict.fromkeys(re.findall(r"::(test_.*)$", listed, re.MULTILINE), ""), set(CONTROLS["signals"])
        else:
            rows = {f"test_case[{case}]": case.says for case in import_module(test.removeprefix("tests/").removesuffix(".py")).CASES}
            controls = {f"test_case[{fault}]" for fault in CONTROLS[args.target]}
        rows = {row: says for row, says in rows.items() if re.search(args.rows, row)}
        left, red = dict(rows), {}
        assert not red_rows(place, test, controls), "the controls fail in the unbroken code"
        for module, what, source, rows_now in mutants(args.target, left):
            plain = (place / module).read_text()
            (place / module).write_text(source)
            found = red_rows(place, test, rows_now | controls)
            (place / module).write_text(plain)
            new = found & left.keys() if controls - found else set()  # a control that is red itself is judged by the other one
            for row in new:
                red[row] = f"{module}, {what}"
                del left[row]
            print(f"{module}, {what}: {'breaks everything' if found >= controls else len(new)} ({len(left)} left)", flush=True)
    for row, why in sorted(red.items()):
        print(f"red: {row}: {why}")
    for row in sorted(left):
        print(f"NEVER RED: {row}")
    print(f"{len(red)} of {len(rows)} rows were seen red")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()

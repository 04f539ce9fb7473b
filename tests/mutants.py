"""Which rows of the fault tables notice when the code is broken? A row that never goes red proves nothing.

    python tests/mutants.py data       # the project is copied; the copy is broken in one place at a time and the rows run there
    python tests/mutants.py config
    python tests/mutants.py runs

Broken are, in turn, the lines of CHANGES (they are changed) and every `raise` of the modules below whose words a row waits for, or
that has none of its own (it is taken out). A mutant that
turns the control row red as well breaks everything, and counts for nothing. A row that was red is not run again. (The signals of
test_faults_signals.py were broken by hand.)
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
                    "prepare_data.py", "sound_world.py", "data.py")}
CONTROLS = {"data": ("spaces in a name", "silence"), "config": ("a word for a number", "an empty config"),
            "runs": ("the same command again when all is done", "a sound that is missing")}
CHANGES = {  # (module, what stands there, what it becomes)
    "data": [
        ("data.py", "soxr.resample(mono.astype(np.float32), rate, sampling_rate)", "mono.astype(np.float32)"),
        ("data.py", "(block / max(peak, 1.0)).mean(axis=1)", "(block / max(peak, 1.0))[:, 0]"),
        ("data.py", '"float64" if sound.subtype == "DOUBLE" else "float32"', '"float32"'),
        ("data.py", "length = min(total, round(window_s * rate))", "length = total"),
        ("data.py", 'flags.append("silent")', "pass"),
        ("data.py", 'flags.append("cancelled by the mono mix")', "pass"),
        ("data.py", 'if image.mode.startswith("I"):', "if False:"),
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
    "config": [],
    "runs": [
        ("runs.py", "recorded != _digest(header, tensors)", "False"),
        ("runs.py", 'path.rename(f"{path}.broken")', "pass"),
        ("runs.py", "for step in reversed(self.steps()):", "for step in self.steps()[-1:]:"),
        ("runs.py", "            stale.unlink()", "            pass"),
        ("runs.py", 'return sorted(int(p.stem.removeprefix("step-")) for p in self.checkpoints.glob("step-*.safetensors"))',
         'return [int(p.stem.removeprefix("step-")) for p in sorted(self.checkpoints.glob("step-*.safetensors"), key=os.path.getmtime)]'),
        ("runs.py", 'FREE_SETTINGS = {"run", "name", "workers", "log_every",', 'FREE_SETTINGS = {"run", "name", "workers",'),
        ("runs.py", "if changed and not allow_changed:", "if changed:"),
        ("runs.py", "                    folder.rename(backup)", "                    import shutil; shutil.rmtree(folder)"),
        ("runs.py", "except OSError as error:\n                print(f\"{self.path(old)}", "except PermissionError as error:\n                print(f\"{self.path(old)}"),
        ("runs.py", 'if header["fingerprints"] != fingerprints:', 'if header["fingerprints"] != fingerprints or header["settings"]["precision"] != "fp32":'),
        ("train_stage1.py", "if step >= cfg.steps:", "if step == cfg.steps:"),
        ("features.py", "except (OSError, SafetensorError, ValueError, RecursionError):", "except OSError:"),
        ("features.py", "if len(bad) > limit * total:", "if bad:"),
        ("common.py", "finite = bool(torch.isfinite(loss + grad_norm))", "finite = True"),
    ]}


def taken_out(source: str, sentences: list[str]):
    """(where, source) for every raise statement that says a part of one of the sentences, or what a variable holds."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            said = "".join(part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))
            if said and all(SequenceMatcher(None, said, one, False).find_longest_match().size < 12 for one in sentences):
                continue
            first = lines[node.lineno - 1]
            mutated = [*lines[:node.lineno - 1], first[:node.col_offset] + "pass\n", *lines[node.end_lineno:]]
            yield f"line {node.lineno}: {first.strip()[:90]}", "".join(mutated)


def mutants(target: str, left: dict[str, str]):
    """(module, what was done, its source) in turn; `left` holds the rows that were not red yet and their sentences."""
    for module, old, new in CHANGES[target]:
        source = (ROOT / module).read_text()
        assert source.count(old) == 1, f"{module}: {old!r} stands there {source.count(old)} times"
        yield module, f"{old.strip()[:60]} -> {new.strip()[:60]}", source.replace(old, new)
    for module in TARGETS[target]:
        for where, source in taken_out((ROOT / module).read_text(), [*left.values()]):
            yield module, where, source


def red_rows(place: Path, test: str, rows: set[str]) -> set[str]:
    """The rows that fail there."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider",
                           *(f"{test}::test_case[{row}]" for row in sorted(rows))], cwd=place, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"})
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {row for row in rows if re.search(rf"^(?:FAILED|ERROR) {re.escape(f'{test}::test_case[{row}]')}", done.stdout, re.MULTILINE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS])
    args = parser.parse_args()
    test = f"tests/test_faults_{args.target}.py"
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "copy"
        for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
        rows = {str(case): case.says for case in import_module(test.removeprefix("tests/").removesuffix(".py")).CASES}
        controls, left, red = set(CONTROLS[args.target]), dict(rows), {}
        assert controls <= rows.keys() and not red_rows(place, test, controls), "the controls fail in the unbroken code"
        for module, what, source in mutants(args.target, left):
            if not left:
                break
            plain = (place / module).read_text()
            (place / module).write_text(source)
            found = red_rows(place, test, left.keys() | controls)
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

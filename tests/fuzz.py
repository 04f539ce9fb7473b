"""What a reader may do with bytes that nobody meant for it: give a value or raise our own error, nothing else.

    python tests/fuzz.py manifest --seconds 600   # or config, or checkpoint; coverage-guided, needs: pip install atheris

The same three functions are what tests/test_properties.py runs with hypothesis. What a run finds is kept in tests/corpus/TARGET and
run as a case ever after.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests/corpus"


def manifest(content: bytes, place: Path) -> None:
    """As metadata.jsonl, and as a list of the founding project; a row that is accepted lies inside the folder."""
    import data
    from config import UserError
    for name in ("metadata.jsonl", "train_metadata.json"):
        for old in ("metadata.jsonl", "train_metadata.json"):
            (place / old).unlink(missing_ok=True)
        (place / name).write_bytes(content)
        try:
            rows, bad = data.read_manifest(place)
        except UserError as error:
            assert str(place) in str(error)
            continue
        assert rows or bad
        for row in rows:
            assert row.split in data.SPLITS and isinstance(row.text, str)
            for path in (row.audio_path, row.image_path):
                assert path.is_relative_to(place.resolve()) and ".." not in path.parts, path


def config(content: bytes, place: Path) -> None:
    """As the config of each stage; a value that is accepted is one that its flag accepts."""
    import train_stage1
    import train_stage2
    import train_stage3
    from config import Number, UserError, parse_config
    (place / "c.json").write_bytes(content)
    for number, stage in enumerate((train_stage1, train_stage2, train_stage3), 1):
        parser = stage.build_parser()
        try:
            found = parse_config(parser, f"stage{number}", ["--config", str(place / "c.json")])
        except UserError as error:
            assert str(place / "c.json") in str(error) or str(error).startswith("--frozen-dtype")
            continue
        for action in parser._actions:
            value = getattr(found, action.dest, None)
            if isinstance(action.type, Number) and not isinstance(value, list):
                assert action.type.check(value) == value
            assert not action.choices or value in action.choices


def checkpoint(content: bytes, place: Path) -> None:
    """As a checkpoint's whole file, and as the header of one whose digest is right."""
    import safetensors.torch
    import torch

    import runs
    from config import UserError
    path = place / "step-00000001.safetensors"
    tensors = {"audio_proj.a": torch.zeros(2), "b": torch.ones(1)}
    files = [content]
    try:
        header = json.loads(content)
        header = {key: value for key, value in header.items() if key != "sha256"} if isinstance(header, dict) else header
        files.append(safetensors.torch.save(tensors, {"clap2diffusion": json.dumps(
            {**header, "sha256": runs._digest(header, tensors)} if isinstance(header, dict) else header)}))
    except (ValueError, RecursionError):
        pass
    if len(content) > 8:  # a header of safetensors' own, with a length that fits
        files.append(struct.pack("<Q", len(content)) + content + bytes(16))
    for file in files:
        path.write_bytes(file)
        try:
            header, found = runs.read_checkpoint(path)
            part = torch.nn.Linear(1, 1)
            runs.load_objects(path, header, found, {"audio_proj": part})
        except UserError as error:
            assert str(path) in str(error)


TARGETS = {"manifest": manifest, "config": config, "checkpoint": checkpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS])
    parser.add_argument("--seconds", type=int, default=600, help="how long")
    args = parser.parse_args()
    import atheris
    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["data", "config", "runs", "json"]):
        import json.decoder  # noqa: F401

        import config  # noqa: F401
        import data  # noqa: F401
        if args.target == "checkpoint":
            import runs  # noqa: F401
    corpus, run = CORPUS / args.target, TARGETS[args.target]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        place = Path(temporary)
        found = place / "found"
        found.mkdir()
        (place / "work").mkdir()
        atheris.Setup([sys.argv[0], f"-max_total_time={args.seconds}", f"-artifact_prefix={corpus}/", "-max_len=4096", "-timeout=20",
                       str(found), str(corpus)], lambda content: run(content, place / "work"))
        atheris.Fuzz()


if __name__ == "__main__":
    main()

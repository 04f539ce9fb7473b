"""Feed arbitrary bytes to our readers. Each must give a value or raise our own error, and nothing else.

    python tools/fuzz.py manifest --seconds 600   # or config, or checkpoint; needs: pip install atheris

The search is guided by coverage. tests/test_properties.py runs the same three functions with hypothesis. A
run keeps what it finds in tools/corpus/TARGET, and the tests read it as a case from then on.
"""

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tools/corpus"


def manifest(content: bytes, place: Path) -> None:
    """As metadata.jsonl, and as a list of the founding project. An accepted row lies inside the folder."""
    from clap2diffusion.base.exits import UserError
    from clap2diffusion.dataset.manifest import SPLITS, read_manifest
    for name in ("metadata.jsonl", "train_metadata.json"):
        for old in ("metadata.jsonl", "train_metadata.json"):
            (place / old).unlink(missing_ok=True)
        (place / name).write_bytes(content)
        try:
            rows, bad = read_manifest(place)
        except UserError as error:
            assert str(place) in str(error)
            continue
        assert rows or bad
        for row in rows:
            assert row.split in SPLITS and isinstance(row.text, str)
            for path in (row.audio_path, row.image_path):
                assert path.is_relative_to(place.resolve()) and ".." not in path.parts, path


def config(content: bytes, place: Path) -> None:
    """As the config of each stage. An accepted value is one that its flag accepts."""
    import train_stage1
    import train_stage2
    import train_stage3
    from clap2diffusion.base.exits import UserError
    from clap2diffusion.base.settings import Number, parse_config
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
    import torch
    from safetensors.torch import save

    from clap2diffusion.base.exits import UserError
    from clap2diffusion.base.tensor_file import digest, read_tensors
    from common import load_checkpoint
    path = place / "step-00000001.safetensors"
    tensors = {"audio_proj.a": torch.zeros(2), "b": torch.ones(1)}
    files = [content]
    try:
        header = json.loads(content)
        if isinstance(header, dict):
            header.pop("sha256", None)
            header["sha256"] = digest(header, tensors)
        files.append(save(tensors, {"clap2diffusion": json.dumps(header)}))
    except (ValueError, RecursionError):
        pass
    if len(content) > 8:  # a header of safetensors' own, with a length that fits
        files.append(struct.pack("<Q", len(content)) + content + bytes(16))
    for file in files:
        path.write_bytes(file)
        try:
            header, found = read_tensors(path)
            part = torch.nn.Linear(1, 1)
            load_checkpoint(path, header, found, {"audio_proj": part})
        except UserError as error:
            assert str(path) in str(error)


TARGETS = {"manifest": manifest, "config": config, "checkpoint": checkpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS])
    parser.add_argument("--seconds", type=int, default=600, help="how long")
    args = parser.parse_args()
    import atheris
    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["clap2diffusion", "json"]):
        import json.decoder  # noqa: F401

        import clap2diffusion.base.settings  # noqa: F401
        import clap2diffusion.base.tensor_file  # noqa: F401
        import clap2diffusion.dataset.manifest  # noqa: F401
    corpus, run = CORPUS / args.target, TARGETS[args.target]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        place = Path(temporary)
        found = place / "found"
        found.mkdir()
        (place / "work").mkdir()
        atheris.Setup([sys.argv[0], f"-max_total_time={args.seconds}", f"-artifact_prefix={corpus}/",
                       "-max_len=4096", "-timeout=20",
                       str(found), str(corpus)], lambda content: run(content, place / "work"))
        atheris.Fuzz()


if __name__ == "__main__":
    main()

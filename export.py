"""The adapter for other programs: its LoRA in their layout, or a folder for the Hugging Face hub.

    python export.py --run runs/tiny --to diffusers            # load_ip_adapter and load_lora_weights
    python export.py --run runs/tiny --to kohya                # for A1111, Forge, ComfyUI, sd-scripts
    python export.py --run runs/tiny --to peft                 # PeftModel.from_pretrained
    python export.py --run runs/tiny --to hub                  # with a model card, ready to upload
    python export.py --run runs/tiny --to hub --push ME/NAME   # and uploaded

The library that an export is for loads it, and must predict the same noise as our adapter within 1e-4, before
anything takes its place in --out. Nothing is uploaded without --push."""

import argparse

from clap2diffusion.base.exits import run_main
from clap2diffusion.base.settings import new_parser


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, "export.py")
    add = parser.add_argument
    add("--run", default="runs/tiny",
        help="run or stage folder (its adapter.safetensors), or an adapter file (default: runs/tiny)")
    add("--to", required=True, choices=("diffusers", "kohya", "peft", "hub"), help="who shall read it")
    add("--out", default="",
        help="folder to write, new or an earlier export ('' = export-TO in the run's folder)")
    add("--base-model", default="",
        help="another base model for the same adapter ('' = the one it was trained with)")
    add = parser.add_argument_group("for the hub").add_argument
    add("--license", default="", metavar="ID", help="licence of this adapter, such as mit ('' = not stated)")
    add("--base-license", default="", metavar="TEXT",
        help="licence of the base model ('' = what its own model card says, if it has one)")
    add("--data-license", default="", metavar="TEXT", help="licence of the training data ('' = not stated)")
    add("--push", default="", metavar="NAME", help="upload to this repository of the hub ('' = do not)")
    add("--public", action="store_true", help="make the repository, if it is new, public; else it is private")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    # torch loads after every error that needs none
    from clap2diffusion.sharing.request import check_request
    request = check_request(args)
    from clap2diffusion.sharing.exporting import export
    export(args, request)


if __name__ == "__main__":
    run_main(main)

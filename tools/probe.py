"""Before a GPU is spent: how much of the pictures CLAP can tell, which whitening, rate and samples to take.

    python tools/probe.py                                               # the default's data and models
    python tools/probe.py --config configs/sd15.json --data-root my_data --judge my_siglip

From at most 2,000 clips, on a CPU, CLAP's embeddings of the sounds are to predict the judge's embeddings of
their pictures: by a linear probe (ridge regression), and by the adapter's own projection with one linear
layer behind it, trained at stage 1's rate, batch and number of samples. Both with each whitening, on held-out
clips of known classes and on held-out classes. The score is a win rate: the share of other held-out clips
whose picture is less like the prediction than the true one. Chance is 0.5; permuted sounds say what luck
gives. It is a proxy: no diffusion model is asked. Embeddings are kept in --cache-dir, so a stopped run goes
on, and another one with the same clips begins there."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_stage1  # noqa: E402
from clap2diffusion.base.exits import run_main  # noqa: E402
from clap2diffusion.base.settings import SEED, Number, new_parser, parse_config  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--config", default="configs/tiny.json", help="of stage 1: rate, batch, steps, tokens, data, models")
    add("--data-root", default="", help="folder with metadata.jsonl ('' = the config's)")
    add("--clap-model", default="", help="CLAP model: folder or hub name ('' = the config's)")
    add("--judge", default="assets/tiny/judge", help="SigLIP model: folder or hub name; a small one will do")
    add("--clips", type=Number(int, 20), default=2000, help="clips of train and val, each label by its share")
    add("--rates", type=Number(float, 1e-3, 1e3), nargs="+", default=[0.3, 1.0, 3.0],
        help="learning rates to try, as multiples of the config's")
    add("--permutations", type=Number(int, 19), default=99, help="permutations of the sounds")
    add("--seed", type=SEED, default=0, help="seed of the clips, folds, permutations and training")
    add("--cache-dir", default="cache", help="folder of the embeddings")
    add("--out", default="", help="file for what is printed, as Markdown ('' = none)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if torch sees it")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    given = [*(["--data-root", args.data_root] if args.data_root else []),
             *(["--clap-model", args.clap_model] if args.clap_model else [])]
    stage1 = parse_config(train_stage1.build_parser(), "stage1", ["--config", args.config, *given])
    from clap2diffusion.judging.probing import probe  # after all that needs no torch
    probe(args, stage1)


if __name__ == "__main__":
    run_main(main)

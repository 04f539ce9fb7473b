"""Proof that the sound matters: pictures of held-out sounds, of silence and of another clip's sound, judged.

    python evaluate.py --run runs/tiny                        # every test clip, RUN/evaluation.{json,md,html}
    python evaluate.py --run runs/tiny --against runs/other   # the same clips and noise in both, paired
    python evaluate.py --run runs/sd15 --judge google/siglip2-so400m-patch14-384 --clips 500
    python evaluate.py --run runs/tiny --judge ''             # only the sheet and the report

The judge (a SigLIP) first reads the real pictures; if it cannot, nothing is judged. Every clip keeps its
starting noise for all sounds and runs. Pictures are kept in RUN/evaluation, so the same command goes on where
it stopped. A run with three finished stages also gets samples.png, report.json, report.md and its adapter;
one stage's folder, such as runs/tiny/huber of a changed copy, gets report.png, report.json and report.md."""

import argparse
from pathlib import Path

from clap2diffusion.base.exits import UserError, run_main
from clap2diffusion.base.settings import SEED, Number, check_sampling, new_parser, sampling_flags

QUICK_CLIPS = 100


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, "evaluate.py")
    add = parser.add_argument
    # what is judged
    add("--run", default="runs/tiny", help="run or stage folder (its adapter.safetensors), or adapter file")
    add("--against", default="", help="another run to compare with, on the same clips and noise ('' = none)")
    add("--allow-equal", action="store_true",
        help="compare also an adapter with one of equal weights, where every difference is 0")
    add("--data-root", default="", help="folder with metadata.jsonl ('' = the one the run was trained on)")
    add("--split", choices=("train", "val", "test"), default="test", help="which clips")
    add("--clips", type=Number(int, 0), default=0, help="clips, each label by its share (0 = all)")
    add("--quick", action="store_true",
        help=f"{QUICK_CLIPS} clips, no mixtures, half the noises: under two minutes on the default")
    # the judge
    add("--judge", default="assets/tiny/judge",
        help="SigLIP model: folder or hub name ('' = none: only the sheet and the report)")
    add("--min-judge", type=Number(float, 0, 1), default=0.9,
        help="share of real pictures that the judge must read right before it may judge")
    # the pictures
    add("--columns", type=Number(int, 1, 32), default=10,
        help="held-out sounds on the sheet, one a label if it can be")
    add("--guidance", type=Number(float, 1, 100),
        help="classifier-free guidance; 1 = none (default: as generate.py's)")
    add("--guidance-sweep", type=Number(float, 1, 100), nargs="+", default=[],
        help="guidances to try on 100 validation clips; the best one takes the place of --guidance")
    add("--seed", type=SEED, default=0, help="clip i starts from noise seed + i")
    add("--gate", type=Number(float, 0, 1), default=None, help="tanh(gate) instead of the learned one")
    add("--noise", action="store_true",
        help="control: noise for the audio tokens, all must fall to chance; writes evaluation-noise.*")
    add("--base-model", default="",
        help="another base model for the same adapter ('' = the one it was trained with)")
    add("--clap-model", default="", help="where the adapter's CLAP lies now ('' = where it was in training)")
    add("--batch-size", type=Number(int, 1), default=50, help="pictures made at once")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if torch sees it")
    sampling_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_sampling(args)
    if args.guidance_sweep and args.split == "val":
        raise UserError("--guidance-sweep chooses on the validation clips, so they cannot judge its choice; "
                        "leave it or --split val out")
    if args.against and not args.judge:
        raise UserError(f"--against {args.against} needs a judge; give one with --judge, or leave it out")
    if args.guidance_sweep and args.against:
        raise UserError("--guidance-sweep chooses for one run, which would be unfair to the other; give "
                        "--guidance with --against")
    args.clips = args.clips or (QUICK_CLIPS if args.quick else 0)
    from clap2diffusion.judging.clips import check_run
    finished = check_run(args)
    from clap2diffusion.judging.evaluation import evaluate_run
    from clap2diffusion.judging.report import write_report
    from clap2diffusion.world import measure
    if finished:
        write_report(Path(args.run), args)
    if args.judge:
        evaluate_run(args, measure)


if __name__ == "__main__":
    run_main(main)

"""How much slower is the loop than the bare step? Each stage's own script against forward, backward, clip, optimizer.

    python bench/step.py                          # the default model; writes bench/results/step-tiny-DEVICE.{json,md}
    python bench/step.py --sd15                   # SD 1.5's architecture with random weights, 64 px

The real main() runs; after every `--block` of its steps as many bare steps follow, on the same UNet, adapter, optimizer
and batch size, with tensors that lie ready. So both see the same machine at the same time, in turns. The ratio is that of
neighbouring blocks; the first pair is a warm-up. Loader processes may fetch a few batches ahead during bare steps.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from config import Number, new_parser, run_main, write_atomic, write_json  # noqa: E402


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--sd15", action="store_true", help="SD 1.5's architecture with random weights instead of the default's models")
    add("--stages", nargs="+", type=Number(int, 1, 3), default=[1, 2, 3], help="stages to time")
    add("--pairs", type=Number(int, 5), default=9, help="pairs of blocks that count")
    add("--block", type=Number(int, 1), default=20, help="steps in a block")
    add("--batch-size", type=Number(int, 1), default=16, help="samples in a step")
    add("--precision", choices=("bf16", "fp32"), default="fp32", help="as the stages' flag")
    add("--workers", type=Number(int, 0, 64), default=2, help="loader processes")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as the stages' flag")
    return parser


class Times:
    """Watches a stage from its own calls: takes its parts as they are made, and runs bare steps between its blocks."""

    def __init__(self, args, torch):
        self.args, self.torch, self.steps, self.ours, self.bare, self.began = args, torch, 0, [], [], None

    def now(self) -> float:
        if self.torch.cuda.is_available() and self.args.device != "cpu":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def bare_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            pred = self.predict(*self.inputs)
        loss = self.torch.nn.functional.mse_loss(pred.float(), self.target)
        loss.backward()
        self.clip(self.parameters, 0.5)
        self.optimizer.step()

    def after_step(self) -> None:
        """Called as the last thing of every real step."""
        self.steps += 1
        if self.steps % self.args.block:
            return
        if self.began is not None:
            self.ours.append((self.now() - self.began) / self.args.block)
        self.began = self.now()
        for _ in range(self.args.block):
            self.bare_step()
        now = self.now()
        if len(self.bare) < len(self.ours) + 1:
            self.bare.append((now - self.began) / self.args.block)
        self.began = now


def time_stage(stage: int, flags: list[str], args) -> dict:
    """Seconds per step of a stage's script and of the bare step, by block."""
    import statistics

    import torch

    import common
    import parallel
    times = Times(args, torch)
    plain = {"wrap": parallel.wrap, "log_step": common.log_step, "device": common.pick_device,
             "clip": torch.nn.utils.clip_grad_norm_, "adam": torch.optim.Adam, "adamw": common.make_adamw}

    def wrap(predict, **parts):
        def model(*inputs):
            pred = predict(*inputs)
            if not hasattr(times, "inputs"):
                times.inputs, times.target = [x.detach().clone() for x in inputs], torch.randn_like(pred.detach().float())
            return pred
        times.predict = predict
        return model

    def clip(parameters, norm):
        times.parameters = parameters
        return plain["clip"](parameters, norm)

    def keep(name):
        def made(*arguments, **options):
            times.optimizer = plain[name](*arguments, **options)
            return times.optimizer
        return made

    def device(*arguments):
        found, times.autocast = plain["device"](*arguments)
        return found, times.autocast

    def log_step(*arguments, **options):
        plain["log_step"](*arguments, **options)
        times.after_step()

    times.clip = plain["clip"]
    parallel.wrap, common.log_step, common.pick_device = wrap, log_step, device
    torch.nn.utils.clip_grad_norm_, torch.optim.Adam, common.make_adamw = clip, keep("adam"), keep("adamw")
    try:
        script = __import__(f"train_stage{stage}")
        sys.argv[0] = f"train_stage{stage}.py"
        script.main(flags)
    finally:
        parallel.wrap, common.log_step, common.pick_device = plain["wrap"], plain["log_step"], plain["device"]
        torch.nn.utils.clip_grad_norm_, torch.optim.Adam, common.make_adamw = plain["clip"], plain["adam"], plain["adamw"]
    pairs = list(zip(times.ours, times.bare[1:]))[1:]  # ours, then the bare block after it; the first is a warm-up
    ratios = sorted(a / b for a, b in pairs)
    return {"stage": stage, "pairs": len(pairs), "ours_s": statistics.median(a for a, _ in pairs),
            "bare_s": statistics.median(b for _, b in pairs), "ratio": statistics.median(ratios), "low": ratios[0],
            "high": ratios[-1]}


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import platform

    import torch
    steps = args.block * (args.pairs + 2)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        base, clap = "assets/tiny/base", "assets/tiny/clap"
        if args.sd15:
            from models import make_sd15
            make_sd15(place)
            base, clap = str(place / "base"), str(place / "clap")
        import prepare_data
        prepare_data.main(["world", "--out", str(place / "world"), "--train", "200", "--val", "4", "--test", "2"])
        flags = ["--config", "", "--data-root", str(place / "world"), "--run", str(place / "run"), "--cache-dir", str(place / "cache"),
                 "--base-model", base, "--clap-model", clap, "--precision", args.precision, "--device", args.device,
                 "--batch-size", str(args.batch_size), "--workers", str(args.workers), "--validate-every", "0", "--val-draws", "1",
                 "--samples", "0", "--save-every", str(10 * steps)]
        rows = []
        for stage in range(1, max(args.stages) + 1):
            n = steps if stage in args.stages else 1
            more = ["--steps", str(n)] + (["--min-steps", str(n), "--away-steps", str(n + 1)] if stage == 3 else [])
            row = time_stage(stage, flags + more, args) if stage in args.stages else __import__(f"train_stage{stage}").main(flags + more)
            rows += [row] if row else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    name = f"step-{'sd15' if args.sd15 else 'tiny'}-{device.split(',')[0].replace(' ', '-')}"
    command = "python bench/step.py " + " ".join(sys.argv[1:] if argv is None else argv)
    lines = [f"`{command.strip()}`: {device}, torch {torch.__version__}, batch {args.batch_size}, {args.precision}, blocks of {args.block} "
             "steps in turns; median of the pairs' ratios, lowest and highest.", "",
             "| stage | pairs | script, ms a step | bare step, ms | ratio |", "|---|---|---|---|---|"]
    lines += [f"| {row['stage']} | {row['pairs']} | {row['ours_s'] * 1000:.1f} | {row['bare_s'] * 1000:.1f} | "
              f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |" for row in rows]
    write_json(HERE / "results" / f"{name}.json", {"command": command, "device": device, "torch": torch.__version__,
                                                   "machine": platform.processor() or platform.machine(), "rows": rows})
    write_atomic(HERE / "results" / f"{name}.md", ("\n".join(lines) + "\n").encode())
    print(json.dumps(rows, indent=2), "\n".join(lines), sep="\n")


if __name__ == "__main__":
    run_main(main)

"""How much slower is the loop than the bare step? Each stage's own script against forward, backward, clip, optimizer.

    python bench/step.py                          # the default model; writes bench/results/step-tiny-DEVICE.{json,md}
    python bench/step.py --sd15                   # SD 1.5's architecture with random weights, 64 px

The real main() runs; after every `--block` of its steps as many bare steps follow, on the same UNet, adapter, optimizer
and batch size, with tensors that lie ready. So both see the same machine at the same time, in turns. The ratio is that of
neighbouring blocks; the first pair is a warm-up. Loader processes may fetch a few batches ahead during bare steps.

A second table, loop-*, says where the difference goes: the time inside each part of the loop that the bare step does not have.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench_tools import device_name, model_flags, models, spread, write_results

from config import Number, new_parser, run_main


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    model_flags(parser)
    add("--stages", nargs="+", type=Number(int, 1, 3), default=[1, 2, 3], help="stages to time")
    add("--pairs", type=Number(int, 5), default=40, help="pairs of blocks that count")
    add("--block", type=Number(int, 1), default=5, help="steps in a block")
    add("--batch-size", type=Number(int, 1), default=16, help="samples in a step")
    add("--image-size", type=Number(int, 64, 1024, multiple_of=64), default=64, help="side of the pictures")
    add("--frozen-dtype", choices=("fp32", "bf16"), default="fp32", help="as the stages' flag")
    add("--precision", choices=("bf16", "fp32"), default="fp32", help="as the stages' flag")
    add("--workers", type=Number(int, -1, 64), default=-1, help="as the stages' flag")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as the stages' flag")
    return parser


PARTS = {  # of the loop, beside the bare step: (module, name) of the calls that are timed
    "fetch the batch": (("features", "make_loader"),),
    "seed, draw, drop": (("common", "Draws"), ("common.Draws", "normal"), ("common.Draws", "integers"), ("common", "draw_latents"),
                         ("common", "draw_timesteps"), ("common", "draw_window"), ("common", "drop_conditions")),
    "noisy latents, target, weights": (("diffusers.DDPMScheduler", "add_noise"), ("common", "diffusion_target"), ("common", "min_snr_weights")),
    "finite?": (("common.FiniteCheck", "__call__"),),
    "bar and log": (("common", "log_step"),),
}


class Parts:
    """While entered, adds up the seconds inside each of PARTS; of calls inside one another the outer one counts."""

    def __init__(self):
        self.seconds, self.inside, self.plain = dict.fromkeys(PARTS, 0.0), False, []

    def timed(self, part: str, function):
        def call(*arguments, **options):
            if self.inside:
                return function(*arguments, **options)
            self.inside, began = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.inside = False
                self.seconds[part] += time.perf_counter() - began
        return call

    def batches(self, part: str, make):
        def made(*arguments):
            ready = self.timed(part, iter(make(*arguments)).__next__)
            return iter(ready, object())  # for ever: the stage knows when it has enough
        return made

    def __enter__(self):
        for part, calls in PARTS.items():
            for place, name in calls:
                module, _, kind = place.partition(".")
                owner = getattr(__import__(module), kind) if kind else __import__(module)
                self.plain.append((part, owner, name, getattr(owner, name)))
        for part, owner, name, plain in self.plain:
            setattr(owner, name, (self.batches if name == "make_loader" else self.timed)(part, plain))
        return self

    def __exit__(self, *exc) -> None:
        for _, owner, name, plain in self.plain:
            setattr(owner, name, plain)


class Enough(Exception):
    """All is measured: the stage need not be finished."""


class Times:
    """Watches a stage from its own calls: takes its parts as they are made, and runs bare steps between its blocks."""

    def __init__(self, args, torch, at_end, counted: Parts):
        self.args, self.torch, self.at_end, self.counted = args, torch, at_end, counted
        self.steps, self.ours, self.bare, self.parts, self.began = 0, [], [], [], None

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
            self.parts.append({part: seconds / self.args.block for part, seconds in self.counted.seconds.items()})
        self.counted.seconds = dict.fromkeys(PARTS, 0.0)
        self.began = self.now()
        for _ in range(self.args.block):
            self.bare_step()
        now = self.now()
        if len(self.bare) < len(self.ours) + 1:
            self.bare.append((now - self.began) / self.args.block)
        if self.at_end and self.steps == self.args.block * (self.args.pairs + 2):
            self.at_end(self)
            raise Enough
        self.began = self.now()


def time_stage(stage: int, flags: list[str], args, at_end=None) -> tuple[dict, dict]:
    """Seconds per step of a stage's script and of the bare step, by block, and milliseconds in each of PARTS.

    at_end(times) is called after the last step.
    """
    with Parts() as counted:
        return _time_stage(stage, flags, args, at_end, counted)


def _time_stage(stage: int, flags: list[str], args, at_end, counted: Parts) -> tuple[dict, dict]:
    import torch

    import common
    import parallel
    times = Times(args, torch, at_end, counted)
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
    except Enough:
        pass
    finally:
        parallel.wrap, common.log_step, common.pick_device = plain["wrap"], plain["log_step"], plain["device"]
        torch.nn.utils.clip_grad_norm_, torch.optim.Adam, common.make_adamw = plain["clip"], plain["adam"], plain["adamw"]
    pairs = list(zip(times.ours, times.bare[1:]))[1:]  # ours, then the bare block after it; the first is a warm-up
    added = 1000 * statistics.median(ours - bare for ours, bare in pairs)
    parts = {part: 1000 * statistics.median(seconds[part] for seconds in times.parts[1:]) for part in PARTS}
    return ({"stage": stage, "pairs": len(pairs), "script, s a step": spread([ours for ours, _ in pairs]),
             "bare step, s": spread([bare for _, bare in pairs]), "ratio": spread([ours / bare for ours, bare in pairs])},
            {"stage": stage, "the loop adds, ms": added, **parts, "the rest": added - sum(parts.values())})


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    steps = args.block * (args.pairs + 2)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        import prepare_data
        prepare_data.main(["world", "--out", str(place / "world"), "--train", str(max(200, args.batch_size)), "--val", "4", "--test", "2"])
        flags = ["--config", "", "--data-root", str(place / "world"), "--run", str(place / "run"), "--cache-dir", str(place / "cache"),
                 *models(args, place), "--image-size", str(args.image_size), "--precision", args.precision, "--frozen-dtype", args.frozen_dtype,
                 "--device", args.device, "--batch-size", str(args.batch_size), "--workers", str(args.workers), "--validate-every", "0",
                 "--val-draws", "1", "--samples", "0", "--save-every", "1000000"]
        rows, parts = [], []
        for stage in range(1, max(args.stages) + 1):
            n = steps if stage in args.stages else 1
            more = ["--steps", str(n)] + (["--min-steps", str(n), "--away-steps", str(n + 1)] if stage == 3 else [])
            if stage in args.stages:
                for table, row in zip((rows, parts), time_stage(stage, flags + more, args), strict=True):
                    table.append(row)
            else:
                __import__(f"train_stage{stage}").main([*flags, *more, "--name", f"stage{stage}"])
    about = (f"batch {args.batch_size}, {args.image_size} px, {args.precision}, blocks of {args.block} steps in turns; median [lowest, highest] "
             "of the pairs")
    kind = "sd15" if args.sd15 else "tiny"
    write_results(f"step-{kind}", "step.py", argv, about, rows, args.device)
    if not device_name(args.device).startswith("CPU"):
        return  # where a GPU computes, the part that first asks for a result waits for all of it
    write_results(f"loop-{kind}", "step.py", argv, "the same run; milliseconds a step, medians of the blocks", parts, args.device)


if __name__ == "__main__":
    run_main(main)

"""The gate sweep of stage 3 and its verdict: validation loss against tanh(gate), as a table and as a plot."""

import argparse
import io
from pathlib import Path

from clap2diffusion.base import files, processes
from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.statistics import FEWEST, interval, show_interval
from clap2diffusion.engine.changes import nothing_learned
from common import AudioAttentionAdapter

NAMES = {"right": "right sound", "silence": "silence", "other": "another's sound"}
IN_WINDOW, ELSEWHERE, AWAY = "in the window", "settled elsewhere", "walked away"
EXIT_CODES = {IN_WINDOW: 5, ELSEWHERE: 3, AWAY: 4}  # where the sound was not shown to help; else 0
COLOURS = {"right": "tab:blue", "silence": "tab:gray", "other": "tab:red", "learned": "black"}


def sweep_gate(audio_attn: AudioAttentionAdapter, measure, sounds: tuple[str, ...] = tuple(NAMES)
               ) -> list[dict]:
    """The loss with each of the sounds at each tanh(gate) from 0 to 1; the gate is put back. A row for each:
    {"tanh_gate": 0.1, "right": [mean, low, high], "silence": [...], "other": [...]}, 95 % intervals.
    measure(sounds=...): common.validation_losses() at the gate as it is."""
    kept, table = audio_attn.gate.data.clone(), []
    for strength in [i / 10 for i in range(11)] if processes.first() else []:
        audio_attn.set_strength(strength)
        losses = {name: interval(values.mean(1)) for name, values in measure(sounds=sounds)[0].items()}
        table.append({"tanh_gate": strength, **losses})
    audio_attn.gate.data.copy_(kept)
    return table


def read_sweep(rows: list[dict]) -> list[dict]:
    """A sweep as it is written now. The first ones had the right sound alone, as loss, low and high."""
    return [{"tanh_gate": row["tanh_gate"], "right": [row["loss"], row["low"], row["high"]]}
            if "loss" in row else row for row in rows]


def judge_gate(ended: str, tanh_gate: float, validation: dict[str, list[float]], n: int, cfg
               ) -> tuple[str, str]:
    """Stage 3's verdict, IN_WINDOW, ELSEWHERE or AWAY, and why it does not show that the sound helps; '' if
    it does.
    n: the validation clips.

    A gate in the window shows that the audio branch lowers the loss. A branch that has only learned the look
    of the pictures does that too, whatever the sound. So the right sound must also be better than silence and
    better than another's, at the learned gate: both lower bounds of the paired differences are above 0."""
    if ended == "the gate walked away":
        low = tanh_gate < cfg.away_low
        return AWAY, f"{AWAY}: {'the sound raises the loss' if low else 'the loss asks for ever more sound'}"
    found = {name: validation[f"{name}_minus_right"] for name in ("silence", "other")}
    if n < FEWEST:
        why = f"{n} validation clips are too few to tell whether the sound helps, expected at least {FEWEST}"
    elif min(low for _, low, _ in found.values()) > 0:
        why = ""
    else:
        said = ", ".join(f"{name} - right {show_interval(values, 5)}" for name, values in found.items())
        why = f"the gate learned the pictures' look, not the sound ({said}; both must be above 0)"
    if cfg.window_low <= tanh_gate <= cfg.window_high:
        return IN_WINDOW, why
    return ELSEWHERE, (f"{ELSEWHERE}: the gate has not come into the window, and "
                       f"{why or 'where it is the right sound is better than silence and than another'}")


def _read_result(folder: Path) -> dict:
    path = folder / "result.json"
    return files.read_json(path) if path.exists() else {}


def read_verdict(folder: Path) -> tuple[str, str]:
    """judge_gate() of a finished stage 3, from its result.json; ('', '') for a folder without one. Results
    from before there was a verdict are judged now."""
    result = _read_result(folder)
    if "window" not in result:  # only stage 3 has one
        return "", ""
    cfg = files.read_json(folder / "config.json")
    found = judge_gate(result["ended"], result["tanh_gate"], result["validation"],
                       cfg["val_clips"] or FEWEST, argparse.Namespace(**cfg))
    return result.get("verdict", found[0]), result.get("warning", found[1])


def find_warning(folder: Path) -> str:
    """Why a finished stage's result may be worth nothing, from its result.json: of stage 3 what judge_gate()
    says, of the others nothing_learned(); '' for a good one and for a folder without a result."""
    return read_verdict(folder)[1] or nothing_learned(_read_result(folder))


def asks_for_proof(cfg) -> bool:
    """Whether the exit code is to say that the sound was not shown to help: stage 3's --require-proof."""
    return getattr(cfg, "require_proof", False)


def require_proof(folder: Path, cfg) -> None:
    """Raises RunFailed with the verdict's exit code: the finished stage 3 in this folder did not show that
    the sound helps, and --require-proof is on. Of several processes the one that writes says so."""
    if not processes.first() or not asks_for_proof(cfg):
        return
    verdict, warning = read_verdict(folder)
    if warning:
        raise RunFailed(f"{folder}: {warning}; the adapter is finished and carries this as a warning; see "
                        "sweep.png there, and train stages 1 and 2 anew or longer; --no-require-proof makes "
                        "the exit code 0", EXIT_CODES[verdict])


def conclude(folder: Path, progress, sweep_after: list[dict], tanh_gate: float, validation: dict, n_val: int,
             cfg) -> dict:
    """Write the sweeps as sweep.json and sweep.png; what result.json says of the gate: in_window, window,
    both sweeps, `verdict` and `warning` of judge_gate(). n_val: clips of the validation split."""
    window, before = (cfg.window_low, cfg.window_high), read_sweep(progress.sweep_before)
    n = min(n_val, cfg.val_clips or n_val)
    verdict, warning = judge_gate(progress.ended, tanh_gate, validation, n, cfg)
    if warning:
        last = progress.gates or [tanh_gate]  # checkpoints did not always hold them
        warning += (f": tanh(gate) {tanh_gate:.2f} after {progress.step} steps, the window is "
                    f"[{cfg.window_low}, {cfg.window_high}]; over the last {len(last)} steps it was between "
                    f"{min(last):.2f} and {max(last):.2f}")
    found = {"in_window": window[0] <= tanh_gate <= window[1], "window": window, "verdict": verdict,
             "warning": warning, "sweep_before": before, "sweep_after": sweep_after}
    if processes.first():
        files.write_json(folder / "sweep.json", {
            "before": before, "after": sweep_after, "tanh_gate": tanh_gate, "verdict": verdict,
            "warning": warning})
        files.write_atomic(folder / "sweep.png", _plot({**found, "tanh_gate": tanh_gate}))
    return found


def draw_sweep(axes, stage: dict, colours: dict[str, str]) -> None:
    """Draw what is known of a stage 3 into matplotlib's `axes`, by the keys of its result.json: loss with
    each sound before and after, with 95 % interval, the window and the learned gate. colours: of the sounds
    and of the "learned" line."""
    if "window" in stage:
        axes.axvspan(*stage["window"], color=colours["silence"], alpha=0.2, linewidth=0, label="window")
    for name, title in NAMES.items():
        for when, style in (("before", "--"), ("after", "-")):
            rows = [(row["tanh_gate"], *row[name]) for row in read_sweep(stage.get(f"sweep_{when}") or [])
                    if name in row]
            if rows:
                x, loss, low, high = zip(*rows)
                label = title if when == "after" else f"{title}, before"
                axes.plot(x, loss, style, color=colours[name], marker="o", markersize=3, label=label)
                axes.fill_between(x, low, high, color=colours[name], alpha=0.1, linewidth=0)
    if (gate := stage.get("tanh_gate")) is not None:
        axes.axvline(gate, color=colours["learned"], linewidth=1.2, label=f"learned: {gate:.3f}")
    axes.set(xlabel="tanh(gate)", ylabel="validation loss")


def _plot(stage: dict) -> bytes:
    """The PNG of both sweeps."""
    from matplotlib.figure import Figure  # here: the other stages do without matplotlib
    figure, content = Figure(figsize=(6, 4.5), dpi=120, layout="constrained"), io.BytesIO()
    axes = figure.add_subplot(title="Which sound lowers the loss, at what gate")
    draw_sweep(axes, stage, COLOURS)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(content, format="png")
    return content.getvalue()

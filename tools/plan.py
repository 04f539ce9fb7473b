"""Print the shell assignments of run_all_stages.sh: each stage's flags, checked against all stages first.

    python tools/plan.py configs/tiny.json --seed 1     # every flag goes to the stages that know it"""

import importlib
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import prepare_data  # noqa: E402
from clap2diffusion.base.exits import UserError, run_main  # noqa: E402
from clap2diffusion.base.files import read_json  # noqa: E402
from clap2diffusion.base.settings import nearest, parse_config, rank_growth  # noqa: E402
from clap2diffusion.dataset.manifest_file import find_manifest  # noqa: E402
from clap2diffusion.videos.preparing import read_plan  # noqa: E402

STAGES = [importlib.import_module(f"train_stage{number}") for number in (1, 2, 3)]


def with_values(flags: list[str], known: list[set[str]]) -> list[list[str]]:
    """Each flag with its values. Raises UserError where a value comes first or no stage knows a flag."""
    groups: list[list[str]] = []
    for token in flags:
        if not token.startswith("--") and not groups:
            raise UserError(f"got {token!r} after the config, expected a flag --name")
        if token.startswith("--"):
            groups.append([])
        groups[-1].append(token)
    for flag in (group[0].split("=")[0] for group in groups):
        if flag in ("--config", "--name", "--init-from", "--dry-run", "--help"):
            raise UserError(f"{flag} is for one stage alone; give it to python train_stageN.py")
        if not any(flag in options for options in known):
            raise UserError(f"no stage knows {flag}; {nearest(flag, set().union(*known))}")
    return groups


def lists_for_scripts(config: str) -> dict[str, list]:
    """What a config gives to prepare_data.py and evaluate.py. Raises UserError if they could not take it."""
    lists = {"data": [], "evaluate": ["--judge", ""]}
    lists |= {key: value for key, value in read_json(config).items() if key in lists}
    if isinstance(lists["data"], list) and all(isinstance(step, list) for step in lists["data"]):
        steps = lists["data"]
    else:
        steps = [lists["data"]]
    for key, values in (*(("data", step) for step in steps), ("evaluate", lists["evaluate"])):
        if not isinstance(values, list) or not all(isinstance(token, str) for token in values):
            several = ", or a list of such lists" if key == "data" else ""
            script = "prepare_data.py" if key == "data" else "evaluate.py"
            raise UserError(f"{config}: {key} is {json.dumps(lists[key])}, expected a list of texts, "
                            f"as for {script}{several}")
    evaluate.build_parser().parse_args(lists["evaluate"])
    return lists | {"data": steps}


def data_steps(config: str, steps: list[list[str]], data_root: str, of_flag: bool) -> list[list[str]]:
    """The arguments of prepare_data.py for each step that makes the data; {data_root} in them is the data
    root. There are none where --data-root names another folder than the steps make, or one made by hand.
    Raises UserError: a step's flags are wrong, or the videos or the list of the first one."""
    for_any = any("{data_root}" in token for step in steps for token in step)
    if of_flag and not for_any:
        return []
    root = Path(data_root)
    by_hand = for_any and not (root / "settings.json").exists()
    manifest = find_manifest(root) if by_hand else None
    if manifest:
        print(f"{manifest} is there, so prepare_data.py is left out", file=sys.stderr)
        return []
    steps = [[token.replace("{data_root}", data_root) for token in step] for step in steps]
    try:
        parsed = [prepare_data.build_parser().parse_args(step) for step in steps]
        if any(getattr(one, "shard", (1, 1)) != (1, 1) for one in parsed):
            raise UserError("--shard makes a share of the data; run prepare_data.py with it on each machine, "
                            "and leave it out here")
        if parsed[0].command == "videos":  # a later one may read what the first makes
            read_plan(parsed[0], lambda _: None)
    except UserError as error:
        raise UserError(f"{config}: data: {error}") from None
    return steps


def plan(config: str, flags: list[str]) -> None:
    """Print the assignments. Raises UserError for any mistake that a stage itself would find."""
    parsers = [stage.build_parser() for stage in STAGES]
    for stage, parser in zip(STAGES, parsers, strict=True):
        parser.prog = f"{stage.__name__}.py"  # whose --help an error names
    known = [{option for action in parser._actions for option in action.option_strings} for parser in parsers]
    groups, resolved = with_values(flags, known), []
    for number, (parser, options) in enumerate(zip(parsers, known, strict=True), start=1):
        args = ["--config", config]
        args += [token for group in groups if group[0].split("=")[0] in options for token in group]
        resolved.append(parse_config(parser, f"stage{number}", args))
        print(f"STAGE{number}=({shlex.join(args)})")
    rank_growth(resolved[1])
    for key in ("run", "data_root", "base_model", "clap_model", "image_size"):
        if len({getattr(cfg, key) for cfg in resolved}) > 1:
            raise UserError(f"{config}: {key} differs between the stages; set it once, in the section common")
    lists = lists_for_scripts(config)
    steps = [step for step in lists["data"] if step]
    if steps:
        of_flag = resolved[0].origin.get("data_root") == "flag"
        steps = data_steps(config, steps, resolved[0].data_root, of_flag)
    print(f"DATA=({shlex.join(map(shlex.join, steps))})\nEVALUATE=({shlex.join(lists['evaluate'])})\n"
          f"RUN={shlex.quote(resolved[0].run)}\nDEVICE={resolved[0].device}")


if __name__ == "__main__":
    run_main(lambda: plan(sys.argv[1], sys.argv[2:]))

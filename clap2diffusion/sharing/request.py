"""What export.py is asked for, checked before torch loads: adapter, base model, folder, the hub's login."""

import argparse
import re
from contextlib import contextmanager
from pathlib import Path

from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.pictures.inputs import adapter_facts, find_adapter, find_base
from clap2diffusion.sharing import folders
from clap2diffusion.sharing.layouts import LEFT_OUT, has_lora, read_adapter

LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as the hub's identifiers are
FOR_HUB = ("license", "base_license", "data_license", "push", "public")


def check_request(args: argparse.Namespace) -> argparse.Namespace:
    """Look at the flags, the adapter, its base model, --out and the hub, in this order. Returns the paths
    `adapter_path`, `base`, `out`, the adapter's `facts` and `tensors`, and whether it `has_lora`.
    Raises UserError: the first that is wrong."""
    given = [key for key in FOR_HUB if vars(args)[key]]
    if given and args.to != "hub":
        raise UserError(f"--{given[0].replace('_', '-')} is for --to hub, got --to {args.to}; leave it out")
    if args.public and not args.push:
        raise UserError("--public is for --push NAME; give a name, or leave it out")
    if args.license and not LICENSE_ID.fullmatch(args.license):
        raise UserError(f"--license {args.license!r}: is no identifier of the hub, such as mit or cc-by-4.0; "
                        "give one (other, if it is none of them)")
    adapter_path = find_adapter(args.run)
    facts, tensors = adapter_facts(adapter_path), read_adapter(adapter_path)
    lora = has_lora(tensors)
    if not lora and LEFT_OUT in facts.get("warning", ""):
        raise UserError(f"{adapter_path}: {LEFT_OUT} by an export; give the run or the adapter that it was "
                        "made from")
    if not lora and args.to in ("kohya", "peft"):
        raise UserError(f"{adapter_path}: holds no LoRA (it is of {facts['stage']}), so there is nothing for "
                        f"{args.to}; give a run whose stage 2 trained one, or take --to diffusers")
    base = find_base(args.base_model, facts, adapter_path)
    folder = Path(args.run) if Path(args.run).is_dir() else adapter_path.parent
    out = Path(args.out or folder / f"export-{args.to}")
    if out.is_symlink() or out.name in ("", ".."):
        out = out.resolve()
    folders.check_out(out)
    if args.push:
        check_login(args.push)
    return argparse.Namespace(adapter_path=adapter_path, base=base, out=out, folder=folder, facts=facts,
                              tensors=tensors, has_lora=lora)


def check_login(name: str) -> None:
    """Raises UserError: no repository can have that name, or there is no token that the hub takes.
    Raises RunFailed: the hub cannot be reached."""
    import huggingface_hub  # only --push needs it
    from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"--push {name}: is not a name that the hub takes ({str(error).splitlines()[0]}); "
                        "give OWNER/NAME") from None
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push {name}: there is no token of the hub here; log in with: hf auth login, or "
                        "set HF_TOKEN to one that may write")
    with told(name):
        huggingface_hub.HfApi().whoami()


@contextmanager
def told(name: str, kept: str = ""):
    """Inside, what the hub's client raises becomes one sentence. kept: what stays nevertheless."""
    try:
        yield
    except Exception as error:  # every kind of network failure of the hub's client
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"--push {name}: the hub refuses this token (HTTP {status}); log in with: hf "
                            f"auth login, with a token that may write there{kept}") from None
        if status and 400 <= status < 500 and status != 429:  # asking again would not help
            said = " ".join(str(error).split())
            raise RunFailed(f"--push {name}: the hub refuses it (HTTP {status}: {said:.200}); mend that and "
                            f"run the same command again{kept}") from None
        why = f"HTTP {status}" if status else type(error).__name__
        raise RunFailed(f"--push {name}: the hub did not take it ({why}); run the same command again when it "
                        f"can be reached{kept}") from None


def push(name: str, folder: Path, public: bool) -> str:
    """Upload an exported folder, into a new repository if there is none. Returns its address.
    Raises UserError: the hub refuses. Raises RunFailed: it cannot be reached."""
    import huggingface_hub
    with told(name, f"; the folder is ready: {folder}"):
        api = huggingface_hub.HfApi()
        repo = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=str(folder),
                          commit_message="Adapter, model card and pictures")
        return str(repo)

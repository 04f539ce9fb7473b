"""What export.py is asked for, checked before torch loads: adapter, base model, folder, the hub's login."""

import argparse
from contextlib import contextmanager
from pathlib import Path

from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.pictures.inputs import adapter_facts, find_adapter, find_base
from clap2diffusion.sharing import folders
from clap2diffusion.sharing.layouts import has_lora, read_adapter

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
    adapter_path = find_adapter(args.run)
    facts, tensors = adapter_facts(adapter_path), read_adapter(adapter_path)
    lora = has_lora(tensors)
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

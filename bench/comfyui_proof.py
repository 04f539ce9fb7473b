"""ComfyUI with comfyui/ predicts what stock diffusers predicts, and its workflow makes a picture.

    COMFYUI_PATH=~/ComfyUI python bench/comfyui_proof.py --sd15   # writes bench/results/comfyui-sd15-*
    COMFYUI_PATH=~/ComfyUI python bench/comfyui_proof.py --run runs/tiny --out comfyui.png --only workflow

Needs a Python that has ComfyUI's requirements and ours. Prediction: the UNet's raw output for two sounds in
one batch with guidance, from ComfyUI's sampler code with Load and Apply, against load_stock_pipeline() with
the same file, largest difference relative to the largest value. Workflow: comfyui/workflow.json through
ComfyUI's own server. A base of SD 1.5's shapes is loaded by ComfyUI's own loaders. Of another one, such as
the small base, ComfyUI knows no text encoder and VAE: LoadBase, a node of this file, lends diffusers'."""

import argparse
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import bench_tools as tools
import torch
from safetensors.torch import load_file

import export
from clap2diffusion.base import hub
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.base.files import read_json, write_atomic
from clap2diffusion.base.models import load_part
from clap2diffusion.base.settings import Number
from clap2diffusion.pictures.inputs import find_adapter
from clap2diffusion.pictures.pipelines import MOST_DIFFERENCE, listening, load_stock_pipeline
from clap2diffusion.sharing.layouts import KOHYA_LORA

NODES = tools.ROOT / "comfyui"
STARTUP_S, PICTURE_S = 600, 3600
PARSER = tools.bench_parser(__doc__, image_size=64)
add = PARSER.add_argument
add("--only", nargs="+", choices=("prediction", "workflow"), default=["prediction", "workflow"],
    help="what to prove")
add("--run", default="", help="the run whose adapter makes the workflow's picture ('' = a random one)")
add("--audio", default="", help="the workflow's sound ('' = one of the sound world)")
add("--prompt", default="", help="the workflow's prompt")
add("--steps", type=Number(int, 1), default=2, help="the workflow's sampling steps")
add("--out", default="", help="keep the workflow's picture here ('' = nowhere)")
#       LoRA, weight, a negative sound, guidance
CASES = [(False, 1.0, False, True), (True, 1.0, False, True), (True, 0.5, False, True),
         (True, 1.0, True, True), (True, 1.0, False, False)]


def comfyui_path() -> Path:
    """The folder of COMFYUI_PATH, put before all others that modules are looked for in. Raises UserError."""
    given = os.environ.get("COMFYUI_PATH", "")
    if not (Path(given) / "comfy/sd.py").is_file():
        raise UserError(f"COMFYUI_PATH {given!r}: holds no comfy/sd.py; set it to the folder of ComfyUI")
    path = str(Path(given).resolve())
    if path not in sys.path:
        sys.path.insert(0, path)
    return Path(path)


def node_classes() -> dict:
    """The nodes of comfyui/, imported as ComfyUI imports a folder of custom_nodes."""
    if "clap2diffusion_nodes" not in sys.modules:
        comfyui_path()
        from comfy.cli_args import args
        args.cpu = not torch.cuda.is_available()
        spec = importlib.util.spec_from_file_location("clap2diffusion_nodes", NODES / "__init__.py",
                                                      submodule_search_locations=[str(NODES)])
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules["clap2diffusion_nodes"].NODE_CLASS_MAPPINGS


# --- a base in ComfyUI --------------------------------------------------------------------------------------

def comfy_unet(base: Path, dtype=torch.float32):
    """ComfyUI's model of a base's UNet: by its own loader, or, of other shapes than it knows, in the module
    that it has for SD 1.x."""
    comfyui_path()
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import comfy.utils
    config, noise = read_json(base / "unet/config.json"), read_json(base / "scheduler/scheduler_config.json")
    state = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    if channels[0] == 320:
        return comfy.sd.load_diffusion_model_state_dict(state, {"dtype": dtype})

    class Kind(comfy.supported_models.SD15):
        unet_extra_config = {"num_heads": config["attention_head_dim"], "num_head_channels": -1}
        sampling_settings = {"linear_start": noise["beta_start"], "linear_end": noise["beta_end"],
                             "zsnr": noise.get("rescale_betas_zero_snr", False)}

        def model_type(self, state_dict, prefix=""):
            kind = "V_PREDICTION" if noise.get("prediction_type") == "v_prediction" else "EPS"
            return comfy.model_base.ModelType[kind]

    depth = [["CrossAttn" in kind for kind in config[f"{side}_block_types"]] for side in ("down", "up")]
    kind = Kind({
        "image_size": 32, "in_channels": config["in_channels"], "out_channels": config["out_channels"],
        "model_channels": channels[0], "channel_mult": [one // channels[0] for one in channels],
        "num_res_blocks": [layers] * len(channels), "context_dim": config["cross_attention_dim"],
        "transformer_depth": [int(one) for one in depth[0] for _ in range(layers)],
        "transformer_depth_output": [int(one) for one in depth[1][::-1] for _ in range(layers + 1)],
        "transformer_depth_middle": 1, "use_spatial_transformer": True, "legacy": False,
        "adm_in_channels": None, "use_linear_in_transformer": False, "use_temporal_attention": False})
    kind.set_inference_dtype(dtype, None)
    names = comfy.utils.unet_to_diffusers(kind.unet_config)
    model = kind.get_model({})
    model.diffusion_model.load_state_dict({names[key]: tensor for key, tensor in state.items()})
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = config["norm_num_groups"]  # ComfyUI has 32 for all
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))


class BorrowedText:
    """diffusers' text encoder of a base, with the two calls that ComfyUI's CLIPTextEncode makes."""

    def __init__(self, base: Path):
        import transformers

        from clap2diffusion.dataset.captions import text_limit
        self.tokenizer = hub.load_small(transformers.CLIPTokenizer, base, "base model", "tokenizer")
        self.model = load_part(transformers.CLIPTextModel, base, "base model", "text_encoder",
                               unread=("text_projection.",))
        self.limit = text_limit(base)

    def tokenize(self, text: str):
        return self.tokenizer(text, padding="max_length", max_length=self.limit, truncation=True,
                              return_tensors="pt").input_ids

    def encode_from_tokens_scheduled(self, ids):
        return [[self.model(ids).last_hidden_state, {}]]


class BorrowedVAE:
    """diffusers' VAE of a base, with the call that ComfyUI's VAEDecode makes."""

    def __init__(self, base: Path):
        import diffusers
        self.model = load_part(diffusers.AutoencoderKL, base, "base model", "vae")

    def decode(self, latents):
        # ComfyUI has divided them by SD 1.x's factor
        scaled = latents.float().cpu() * 0.18215 / self.model.config.scaling_factor
        return (self.model.decode(scaled).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)


class LoadBase:
    """A base model's folder of any size as MODEL, CLIP and VAE."""
    CATEGORY, FUNCTION, RETURN_TYPES = "CLAP2Diffusion", "load", ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING", {"default": ""})}}

    def load(self, folder):
        base = Path(folder)
        return comfy_unet(base), BorrowedText(base), BorrowedVAE(base)


NODE_CLASS_MAPPINGS = {"LoadBase": LoadBase}


# --- prediction ---------------------------------------------------------------------------------------------

@torch.no_grad()
def stock_predictions(base: Path, adapters: dict, batch: dict) -> list:
    """What stock diffusers predicts in each of CASES, (rows, C, h, w): [no text, text] where it is guided."""
    found, pipes = [], {}
    for lora, weight, negative, guided in CASES:
        if lora not in pipes:
            pipes.clear()  # one at a time is what fits
            pipes[lora] = load_stock_pipeline(base, adapters[lora], vae=None, text_encoder=None,
                                              tokenizer=None)
        pipe = pipes[lora]
        pipe.set_ip_adapter_scale(weight)
        text = torch.cat([batch["no_text"], batch["text"]] if guided else [batch["text"]])
        with listening(pipe.unet, batch["sounds"], guided, batch["negative"] if negative else None):
            found.append(pipe.unet(torch.cat([batch["latents"]] * (1 + guided)), batch["timestep"],
                                   text).sample)
    return found


@torch.no_grad()
def comfy_prediction(model, batch: dict, guided: bool):
    """What the UNet of a ComfyUI model returns in its sampler's code, [no text, text] where it is guided."""
    import comfy.model_management
    import comfy.sampler_helpers
    import comfy.samplers
    comfy.model_management.load_models_gpu([model])
    model.pre_run()
    sampling, device = model.model.model_sampling, model.load_device
    sigma = sampling.sigma(torch.tensor(float(batch["timestep"]))).to(device)
    rows, unet, seen = batch["latents"].to(device) * (sigma ** 2 + 1) ** 0.5, model.model.diffusion_model, []
    given = {"positive": batch["text"], "negative": batch["no_text"]}
    conds = {name: comfy.sampler_helpers.convert_cond([[text, {}]]) for name, text in given.items()}
    conds = comfy.samplers.process_conds(model.model, rows, conds, device)

    def keep(unet, args, kwargs, output):
        order = kwargs["transformer_options"]["cond_or_uncond"]
        seen.extend(zip(order, output.float().cpu().chunk(len(order))))

    with unet.register_forward_hook(keep, with_kwargs=True):
        comfy.samplers.calc_cond_batch(
            model.model, [conds["positive"], conds["negative"] if guided else None], rows,
            sigma.expand(len(rows)), model.model_options)
    model.cleanup()
    return torch.cat([output for _, output in sorted(seen, key=lambda one: -one[0])])


def core_lora(model, folder: Path):
    """A ComfyUI model with kohya's file of an export, by ComfyUI's own loader at strength 1."""
    import comfy.sd
    import comfy.utils
    lora = comfy.utils.load_torch_file(str(folder / KOHYA_LORA))
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


@torch.no_grad()
def prove_prediction(args: argparse.Namespace, place: Path) -> list[dict]:
    """A row for each of CASES, and one of the LoRA by ComfyUI's own loader.
    Raises RunFailed: a difference is above MOST_DIFFERENCE."""
    base, clap = tools.models(args, place)
    adapters = {lora: place / f"{lora}.safetensors" for lora in (False, True)}
    for lora, path in adapters.items():
        tools.random_adapter(path, base, clap, 8 * lora)
    export.main(["--run", str(adapters[True]), "--to", "kohya", "--out", str(place / "kohya")])
    config, draw = read_json(base / "unet/config.json"), torch.Generator().manual_seed(1)
    width, side = config["cross_attention_dim"], args.image_size // 8
    batch = {"latents": torch.randn(2, 4, side, side, generator=draw), "timestep": torch.tensor(500),
             "text": torch.randn(2, 77, width, generator=draw),
             "no_text": torch.randn(1, 77, width, generator=draw).expand(2, -1, -1),
             "sounds": torch.nn.functional.normalize(torch.randn(2, 512, generator=draw), dim=-1),
             "negative": torch.nn.functional.normalize(torch.randn(1, 512, generator=draw), dim=-1)}
    expected = stock_predictions(base, adapters, batch)
    nodes, name = node_classes(), hub.fingerprint(clap)
    bare = comfy_unet(base)
    sound, other = ({"embeds": batch[key], "clap": name} for key in ("sounds", "negative"))
    plain, rows = {guided: comfy_prediction(bare, batch, guided) for guided in (True, False)}, []
    with_lora = core_lora(bare, place / "kohya")
    ways = [("within the adapter" if case[0] else "no", bare, adapters[case[0]], case, right)
            for case, right in zip(CASES, expected)]
    ways += [("kohya's file, ComfyUI's own loader", with_lora, place / "kohya/adapter.safetensors", CASES[1],
              expected[1])]
    for lora, model, path, (_, weight, negative, guided), right in ways:
        adapter, _ = nodes["CLAP2DiffusionLoad"]().load("(the path below)", str(path))
        model, = nodes["CLAP2DiffusionApply"]().apply(model, adapter, sound, weight, 0.0, 1.0, 1.0,
                                                      other if negative else None)
        got, largest = comfy_prediction(model, batch, guided), max(1.0, float(right.abs().max()))
        rows.append({"LoRA": lora, "weight": weight,
                     "unconditional rows": ["none", "silence", "a negative sound"][guided + negative],
                     "largest difference": float((got - right).abs().max()) / largest,
                     "what the node changes": float((plain[guided] - right).abs().max()) / largest})
        if not rows[-1]["largest difference"] <= MOST_DIFFERENCE:
            raise RunFailed(f"ComfyUI's prediction differs from stock diffusers' by more than "
                            f"{MOST_DIFFERENCE:g}: {rows[-1]}")
    assert torch.equal(comfy_prediction(bare, batch, True), plain[True])  # the clones left it as it was
    return rows


# --- workflow -----------------------------------------------------------------------------------------------

def ask(url: str, body: dict | None = None):
    """The answer's bytes. Raises RunFailed, with what the server says of the request."""
    try:
        with urllib.request.urlopen(url, json.dumps(body).encode() if body else None, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        raise RunFailed(f"{url}: {error.code} {error.read().decode()[:2000]}") from None


def save_checkpoint(base: Path, path: Path) -> None:
    """A base of SD 1.5's shapes as the one file that ComfyUI's CheckpointLoaderSimple reads."""
    comfyui_path()
    from comfy.cli_args import args
    args.cpu = True
    import comfy.sd
    text, vae = (load_file(base / part) for part in (
        "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"))
    if not any(key.startswith("text_model.") for key in text):  # as transformers writes it since version 5
        text = {f"text_model.{key}": tensor for key, tensor in text.items()}
    comfy.sd.save_checkpoint(str(path), comfy_unet(base), vae=comfy.sd.VAE(sd=vae),
                             clip=comfy.sd.load_text_encoder_state_dicts([text]))


def workflow(args: argparse.Namespace, base: Path, clap: Path, place: Path) -> dict:
    """comfyui/workflow.json with this proof's files, size and steps; what it names lies in `place`."""
    for folder in ("input", "models/clap2diffusion", "models/checkpoints", "custom_nodes"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    (place / "custom_nodes/clap2diffusion").symlink_to(NODES, target_is_directory=True)
    adapter = find_adapter(args.run) if args.run else place / "random.safetensors"
    if not args.run:
        tools.random_adapter(adapter, base, clap)
    (place / "models/clap2diffusion/adapter.safetensors").symlink_to(adapter.resolve())
    sound = Path(args.audio) if args.audio else sorted(
        tools.make_world(place / "world", 4).glob("audio/*"))[0]
    (place / "input" / f"sound{sound.suffix}").symlink_to(sound.resolve())
    prompt = read_json(NODES / "workflow.json")
    named = {node["_meta"]["title"]: node for node in prompt.values()}
    if args.size == "sd15":
        save_checkpoint(base, place / "models/checkpoints/sd15.safetensors")
        named["Checkpoint"]["inputs"]["ckpt_name"] = "sd15.safetensors"
    else:
        (place / "custom_nodes/load_base.py").write_text(
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from comfyui_proof import NODE_CLASS_MAPPINGS\n", encoding="utf-8")
        named["Checkpoint"] |= {"class_type": "LoadBase", "inputs": {"folder": str(base)}}
    named["Sound"]["inputs"]["audio"] = f"sound{sound.suffix}"
    named["Adapter"]["inputs"]["adapter"] = "adapter.safetensors"
    named["Hear"]["inputs"]["clap"] = str(clap)
    named["Prompt"]["inputs"]["text"] = args.prompt
    # ComfyUI counts 8 pixels for a place of the latents; the small base has 4
    side = args.image_size * 8 // 2 ** (len(read_json(base / "vae/config.json")["block_out_channels"]) - 1)
    named["Size"]["inputs"] |= {"width": side, "height": side, "batch_size": 1}
    named["Sample"]["inputs"]["steps"] = args.steps
    return prompt


def prove_workflow(args: argparse.Namespace, place: Path) -> dict:
    """Run the workflow through ComfyUI's server on 127.0.0.1. Raises RunFailed."""
    comfyui, (base, clap) = comfyui_path(), (path.resolve() for path in tools.models(args, place))
    prompt, own = workflow(args, base, clap, place / "comfyui"), place / "comfyui"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", place / "comfyui.log"
    command = [sys.executable, comfyui / "main.py", "--base-directory", own, "--listen", "127.0.0.1",
               "--port", port, "--disable-api-nodes", "--force-fp32", "--database-url", f"sqlite:///{own}/comfyui.db",
               *(["--cpu"] if not torch.cuda.is_available() else [])]
    with log.open("wb") as said:
        server = subprocess.Popen(list(map(str, command)), cwd=own, stdout=said, stderr=said)
    try:
        began = time.monotonic()
        while True:
            try:
                ask(f"{url}/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                if server.poll() is not None or time.monotonic() - began > STARTUP_S:
                    raise RunFailed(f"ComfyUI did not start: {log.read_text('utf-8')[-2000:]}") from None
                time.sleep(0.5)
        began = time.monotonic()
        number = json.loads(ask(f"{url}/prompt", {"prompt": prompt}))["prompt_id"]
        while not (history := json.loads(ask(f"{url}/history/{number}"))):
            if server.poll() is not None or time.monotonic() - began > PICTURE_S:
                raise RunFailed(f"ComfyUI made no picture: {log.read_text('utf-8')[-2000:]}")
            time.sleep(0.5)
        seconds, found = time.monotonic() - began, history[number]
        if found["status"]["status_str"] != "success":
            raise RunFailed(f"ComfyUI: {found['status']['messages'][-1]}")
    finally:
        server.terminate()
        server.wait()
    [image] = [image for node in found["outputs"].values() for image in node.get("images", [])]
    content = (own / "output" / image["subfolder"] / image["filename"]).read_bytes()
    if args.out:
        write_atomic(Path(args.out), content)
    from PIL import Image
    size = Image.open(io.BytesIO(content)).size
    if size != (args.image_size, args.image_size):
        raise RunFailed(f"ComfyUI's picture is {size} large, expected {args.image_size}")
    print(f"the workflow's {len(prompt)} nodes made a picture of {size[0]} x {size[1]} in {args.steps} "
          f"steps, {seconds:.0f} s" + f": {args.out}" * bool(args.out), flush=True)
    return {"nodes": len(prompt), "seconds": seconds}


@tools.automain(PARSER)
def main(args: argparse.Namespace, place: Path) -> None:
    if "prediction" in args.only:
        version = (comfyui_path() / "comfyui_version.py").read_text(encoding="utf-8").split('"')[-2]
        tools.write_results(f"comfyui-{args.size}", f"ComfyUI {version}, float32, two sounds in one batch, "
                            f"{args.image_size} px", prove_prediction(args, place))
    if "workflow" in args.only:
        prove_workflow(args, place)

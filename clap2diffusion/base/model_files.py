"""Whether a model's folder is whole and of the kind that we train with, by its JSON files and the headers of
its weights. No heavy import: all of it is told before torch is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from clap2diffusion.base.weights import INTEGERS, Stored, Unusable, find_weights, read_config, read_tensors

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
CHANNELS = {9: "an inpainting model", 8: "an InstructPix2Pix model, which edits pictures",
            5: "a depth-to-image model", 7: "an upscaler"}
CONDITIONS = {"addition_embed_type": {"text_time": "a Stable Diffusion XL UNet"},
              "encoder_hid_dim_type": {}, "class_embed_type": {}, "num_class_embeds": {}}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
INDEX = {  # the parts that a base model's index names, and what they may be; schedulers with such betas
    "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": tuple(f"{kind}Scheduler" for kind in (
        "DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
        "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep",
        "KDPM2Discrete", "KDPM2AncestralDiscrete", "LCM", "TCD", "SASolver", "DDIMParallel",
        "DDPMParallel"))}
CLAPS = ("clap", "clap_audio_model")  # the second one is the audio tower alone
CONVERT = ("python -c \"from diffusers import StableDiffusionPipeline as P; "
           "P.from_single_file('{0}').save_pretrained('{1}')\"")


class Part(NamedTuple):
    """What the header of a part's weights shows. tops: how names begin. shapes: of a tensor, the sizes that
    config.json gives, each a key, a number or None for any."""
    what: str
    tops: tuple[str, ...]
    shapes: dict[str, tuple]


CLIP_TEXT = {"embeddings.token_embedding.weight": ("vocab_size", "hidden_size"),
             "embeddings.position_embedding.weight": ("max_position_embeddings", "hidden_size")}
PARTS = {
    "unet": Part("UNet", ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks",
                          "conv_norm_out", "conv_out"), {
        "conv_in.weight": ("block_out_channels.0", "in_channels"),
        "conv_out.weight": ("out_channels", "block_out_channels.0"),
        "*.attn2.to_k.weight": (None, "cross_attention_dim")}),
    "vae": Part("VAE", ("encoder", "decoder", "quant_conv", "post_quant_conv"), {
        "encoder.conv_in.weight": ("block_out_channels.0", "in_channels"),
        "decoder.conv_in.weight": ("block_out_channels.-1", "latent_channels"),
        "decoder.conv_out.weight": ("out_channels", "block_out_channels.0")}),
    # the library's newest versions write CLIP's text encoder without text_model.
    "text_encoder": Part("CLIP text encoder", ("text_model", "embeddings", "encoder", "final_layer_norm",
                                               "text_projection"), CLIP_TEXT),
    "clap": Part("CLAP", ("audio_model", "audio_projection", "text_model", "text_projection", "logit_scale_a",
                          "logit_scale_t"), {
        "audio_model.audio_encoder.patch_embed.proj.weight": ("audio_config.patch_embeds_hidden_size",),
        "audio_projection.linear1.weight": ("projection_dim", "audio_config.hidden_size")}),
    "judge": Part("SigLIP", ("vision_model", "text_model", "logit_scale", "logit_bias"), {
        "vision_model.embeddings.patch_embedding.weight": (
            "vision_config.hidden_size", "vision_config.num_channels", "vision_config.patch_size"),
        "text_model.embeddings.token_embedding.weight": (
            "text_config.vocab_size", "text_config.hidden_size")})}


def _value(config: dict, key):
    """config's value at a dotted key; None where it has none, so the library's default holds."""
    for name in str(key).split(".") if isinstance(key, str) else ():
        if isinstance(config, list):
            config = config[int(name)] if config else None
        else:
            config = config.get(name) if isinstance(config, dict) else None
    return config if isinstance(config, int) else None


def check_weights(folder: Path, part: str) -> None:
    """Raises Unusable: no weights, a broken file, names or shapes other than config.json and the part's kind
    say."""
    what, tops, shapes = PARTS[part]
    container, files = find_weights(folder)
    tensors, config = read_tensors(files), read_config(folder / "config.json")
    config.setdefault("audio_config", config)  # of an audio tower alone
    foreign = sorted(name for name in tensors if name.split(".")[0] not in tops)
    if foreign:
        raise Unusable(f"{files[0]}: names that no {what} has: {len(foreign)} of {len(tensors)} tensors, "
                       f"first {foreign[0]}; give weights as from_pretrained saves them")
    if files[0].name != container.whole:
        index = folder / container.index
        if differ := sorted(read_config(index)["weight_map"].keys() ^ tensors.keys()):
            raise Unusable(f"{index} and its shards do not name the same tensors: {len(differ)} differ, "
                           f"first {differ[0]}; download it again")
    whole = sorted(name for name, one in tensors.items()
                   if name.endswith(".weight") and one.dtype in INTEGERS)
    if whole:
        raise Unusable(f"{files[0]}: {len(whole)} weights are whole numbers, first {whole[0]} of type "
                       f"{tensors[whole[0]].dtype}; expected floating point, not a quantised copy")
    for pattern, sizes in shapes.items():
        found = {name: one for name, one in tensors.items() if _is(name, pattern)}
        if not found:
            raise Unusable(f"{files[0]}: holds no {pattern.removeprefix('*.')}, which every {what} has, "
                           f"among its {len(tensors)} tensors; download it again")
        for name, one in found.items():
            _check_shape(files[0], folder, name, one, [(key, _value(config, key)) for key in sizes])


def _is(name: str, pattern: str) -> bool:
    return name.removeprefix("text_model.") == pattern or name == pattern or (
        pattern[0] == "*" and name.endswith(pattern[1:]))


def _check_shape(path: Path, folder: Path, name: str, tensor: Stored, sizes: list[tuple]) -> None:
    for at, (key, size) in enumerate(sizes):
        if size is not None and (len(tensor.shape) <= at or tensor.shape[at] != size):
            raise Unusable(f"{path}: {name} has shape {list(tensor.shape)}, but {folder / 'config.json'} "
                           f"says {key} {size}; config and weights must be of one model")


def check_base(folder: Path) -> None:
    """A base model: a Stable Diffusion in diffusers' layout. Raises Unusable, with one sentence."""
    _check_index(folder)
    unet, vae, text = (read_config(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    _check_class(folder / "unet/config.json", unet, "UNet2DConditionModel")
    _check_class(folder / "vae/config.json", vae, "AutoencoderKL")
    if text.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        raise Unusable(f"{folder / 'text_encoder/config.json'}: is a {text['model_type']!r} model; expected "
                       "CLIP's text encoder, 'clip_text_model'")
    _check_unet(folder / "unet/config.json", unet, vae)
    width, expected = text.get("text_config", text).get("hidden_size", 512), unet.get("cross_attention_dim")
    if width != expected:
        raise Unusable(f"{folder}: text embeddings are {width} wide, the UNet's cross-attention expects "
                       f"{expected}; text encoder and UNet must be of one base model")
    _check_scheduler(folder / "scheduler/scheduler_config.json")
    _check_tokenizer(folder / "tokenizer", text.get("text_config", text).get("vocab_size"))
    for part in ("unet", "vae", "text_encoder"):
        check_weights(folder / part, part)


def _check_index(folder: Path) -> None:
    path = folder / "model_index.json"
    if path.exists():
        content = read_config(path)
        kind = content.get("_class_name")
        if kind not in PIPELINES:
            raise Unusable(f"{path}: is a {kind}; expected a Stable Diffusion 1.x or 2.x, StableDiffusion"
                           "Pipeline")
        for part, known in INDEX.items():
            named = content.get(part)
            if not (isinstance(named, list) and len(named) == 2 and named[1] in known):
                raise Unusable(f"{path}: {part} is {named!r}; expected its library and class, such as "
                               f"{known[0]}")
        return
    lora = next((name for name in ("pytorch_lora_weights.safetensors", "adapter_config.json",
                                   "pytorch_lora_weights.bin") if (folder / name).exists()), None)
    if lora:
        raise Unusable(f"{folder} holds a LoRA ({lora}), which is no base model; give the model that it was "
                       "trained on")
    if (folder / "config.json").exists():
        config = read_config(folder / "config.json")
        kind = config.get("_class_name") or config.get("model_type")
        raise Unusable(f"{folder} holds one model alone ({kind}); expected a folder with model_index.json "
                       "and a folder for each part")
    single = next(iter(sorted(p for kind in ("*.ckpt", "*.safetensors") for p in folder.glob(kind))), None)
    if single and not (folder / "unet").exists():
        raise Unusable(single_file(single, "base model"))
    raise Unusable(f"{path} is missing; expected a folder as from_pretrained loads it, or a hub name "
                   "OWNER/NAME")


def single_file(path: Path, what: str) -> str:
    """What to do with a model that is one file."""
    if KINDS[what].example:
        return f"{path} is one file; expected a folder such as that of {KINDS[what].example}"
    return (f"{path} is one file; expected a folder in diffusers' layout, which this makes: "
            + CONVERT.format(path, path.with_suffix("") if path.suffix else f"{path}-folder"))


def _check_class(path: Path, config: dict, expected: str) -> None:
    kind = config.get("_class_name") or config.get("model_type")
    if kind != expected:
        raise Unusable(f"{path}: is of {kind}; expected {expected}, of a Stable Diffusion 1.x or 2.x")


def _check_unet(path: Path, unet: dict, vae: dict) -> None:
    for key, known in CONDITIONS.items():
        value = unet.get(key)
        if value is not None:
            raise Unusable(f"{path}: {key} is {value!r}, " + known.get(value, "a UNet that needs more than a "
                           "text") + "; expected a Stable Diffusion 1.x or 2.x")
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels in CHANNELS and channels != latents:
        raise Unusable(f"{path}: in_channels is {channels}, so this is {CHANNELS[channels]}; expected "
                       f"{latents}, a text-to-image model")
    for key, value in (("in_channels", channels), ("out_channels", unet.get("out_channels", 4))):
        if value != latents:
            raise Unusable(f"{path}: {key} is {value}, the VAE's latents have {latents} channels; VAE and "
                           "UNet must be of one base model")


def _check_scheduler(path: Path) -> None:
    config = read_config(path)
    kind = config.get("_class_name")
    if "FlowMatch" in str(kind) or "flow" in str(config.get("prediction_type")):
        raise Unusable(f"{path}: is of {kind}, for flow matching; expected the noise schedule of a Stable "
                       "Diffusion 1.x or 2.x, such as DDPMScheduler")
    kinds = {"beta_start": (int, float), "beta_end": (int, float), "beta_schedule": str}
    missing = [key for key, expected in kinds.items() if not isinstance(config.get(key), expected)]
    if missing and not config.get("trained_betas"):
        raise Unusable(f"{path}: {kind} without {missing[0]}; expected beta_start, beta_end and "
                       "beta_schedule as the model was trained with")
    if not config.get("trained_betas"):
        first, last, schedule = (config[key] for key in kinds)
        if not 0 < first <= last < 1 or schedule not in BETAS:
            raise Unusable(f"{path}: betas from {first} to {last}, {schedule!r}; expected 0 < beta_start <= "
                           f"beta_end < 1 and one of {', '.join(BETAS)}")
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or steps < 1:
        raise Unusable(f"{path}: num_train_timesteps is {steps!r}; expected a whole number such as 1000")
    predicted = config.get("prediction_type", "epsilon")  # Stable Diffusion 1.5 says nothing of it
    if predicted not in ("epsilon", "v_prediction"):
        raise Unusable(f"{path}: prediction_type is {predicted!r}; expected epsilon or v_prediction")


def _check_tokenizer(folder: Path, limit: int | None) -> None:
    longest = read_config(folder / "tokenizer_config.json").get("model_max_length")
    if longest is not None and not (type(longest) in (int, float) and longest > 2):  # two are special
        raise Unusable(f"{folder / 'tokenizer_config.json'}: model_max_length is {longest!r}; expected a "
                       "number of tokens such as 77")
    whole, vocab = folder / "tokenizer.json", folder / "vocab.json"
    if whole.exists():
        content = read_config(whole)
        model = content.get("model") or {}
        if model.get("vocab") and not isinstance(model["vocab"], dict):
            raise Unusable(f"{whole}: is a {model.get('type')} tokenizer; expected CLIP's, BPE")
        words, merges = model.get("vocab") or {}, model.get("merges")
        ids = [*words.values()] + [token.get("id") for token in content.get("added_tokens") or []]
    elif vocab.exists() and (folder / "merges.txt").exists():
        words = read_config(vocab)
        ids = [*words.values()]
        lines = (folder / "merges.txt").read_text("utf-8").splitlines()
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
        if (folder / "added_tokens.json").exists():
            ids += read_config(folder / "added_tokens.json").values()
    else:
        raise Unusable(f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt; copy or "
                       "download them")
    ids = [number for number in ids if isinstance(number, int)]
    path = whole if whole.exists() else vocab
    if len(ids) < 3:
        raise Unusable(f"{path}: has a vocabulary of {len(ids)}; copy or download it again")
    if not merges and any(len(word.removesuffix("</w>")) > 1 and word[0] != "<" for word in words):
        raise Unusable(f"{folder / 'merges.txt' if path == vocab else path}: holds no merges, so words would "
                       "be read as letters; copy or download it again")
    if limit is not None and max(ids) >= limit:
        raise Unusable(f"{path}: has tokens up to number {max(ids)}, the text encoder knows {limit}; "
                       "tokenizer and text encoder must be of one base model")


def check_clap(folder: Path) -> None:
    """A CLAP of Hugging Face's transformers. Raises Unusable, with one sentence."""
    path, config = folder / "config.json", read_config(folder / "config.json")
    if config.get("model_type") not in CLAPS:
        kind = config.get("model_type") or config.get("_class_name")
        raise Unusable(f"{path}: is a {kind!r} model; expected a CLAP such as laion/clap-htsat-unfused")
    path, extractor = preprocessor(folder)
    kind = extractor.get("feature_extractor_type")
    if kind != "ClapFeatureExtractor":
        raise Unusable(f"{path}: is of {kind}; expected ClapFeatureExtractor")
    for key in ("feature_size", "sampling_rate", "hop_length", "max_length_s", "fft_window_size"):
        if not extractor.get(key, 1) > 0:
            raise Unusable(f"{path}: {key} is {extractor[key]!r}; expected a number above 0")
    check_weights(folder, "clap")


def check_judge(folder: Path) -> None:
    """A SigLIP of fixed picture size. Raises Unusable, with one sentence."""
    kind = read_config(folder / "config.json").get("model_type")
    if kind != "siglip":
        raise Unusable(f"is a {kind!r} model; expected a SigLIP with one picture size, such as "
                       "google/siglip2-so400m-patch14-384")
    path, processor = preprocessor(folder, "image_processor")
    kind = processor.get("image_processor_type")
    if not str(kind).startswith("Siglip"):
        raise Unusable(f"{path}: is of {kind}; expected SiglipImageProcessor")
    read_config(folder / "tokenizer_config.json")
    if not any((folder / name).exists() for name in ("tokenizer.json", "spiece.model", "tokenizer.model")):
        raise Unusable(f"{folder} holds neither tokenizer.json nor spiece.model; copy or download them")
    check_weights(folder, "judge")


def preprocessor(folder: Path, part: str = "feature_extractor") -> tuple[Path, dict]:
    """The settings of a CLAP's or a judge's inputs and their file, as the library finds them."""
    path = folder / "processor_config.json"  # the library's newest versions write this one alone
    nested = read_config(path).get(part) if path.exists() else None
    if nested is not None:
        return path, nested
    path = folder / "preprocessor_config.json"
    return path, read_config(path)


class Kind(NamedTuple):
    """A kind of model: the folders of its parts, its check, and a model of the hub to name."""
    parts: tuple[str, ...]
    check: Callable[[Path], None]
    example: str = ""


def check_model(folder: Path, what: str) -> None:
    """Whether a folder is a model of one of KINDS. Raises Unusable, with one sentence."""
    try:
        KINDS[what].check(folder)
    except Unusable:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise Unusable(f"{folder}: its files hold a value of another type than such a model's "
                       f"({type(error).__name__}: {error}); copy or download it again") from None


KINDS = {"base model": Kind(("unet", "vae", "text_encoder", "tokenizer", "scheduler"), check_base),
         "CLAP model": Kind(("",), check_clap, "laion/clap-htsat-unfused"),
         "judge": Kind(("",), check_judge, "google/siglip2-so400m-patch14-384")}

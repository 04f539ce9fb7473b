"""The three nodes: Load (an adapter), Encode (a sound), Apply (both to a model).

Shapes: B rows of the UNet's batch, S sounds, Q places in the picture, N audio tokens."""

import logging
import os

import comfy.lora
import comfy.sd
import folder_paths
import torch
from comfy.ldm.modules.attention import optimized_attention

from .adapter import audio_tokens, describe, keys_and_values, lora_tensors, match_attentions, read_adapter
from .hearing import embed, find_clap, fingerprint

BY_PATH = "(the path below)"
ADAPTERS, CLAPS = "clap2diffusion", "clap"
for name, kinds in ((ADAPTERS, {".safetensors"}), (CLAPS, {""})):
    places, known = folder_paths.folder_names_and_paths.get(name, ([], kinds))  # others may know them too
    own = os.path.join(folder_paths.models_dir, name)
    folder_paths.folder_names_and_paths[name] = (places + [own] * (own not in places), known or kinds)


class AudioAttention:
    """Replacement of one cross-attention (ComfyUI's attn2): what was there, plus weight * attend(q, audio).

    `previous` is what another node had put there, or None for the attention over the text. Nodes that come
    later may add(callback): such a callback returns what is to be added, as IP-Adapter nodes have it."""

    def __init__(self, previous, sound: tuple, negative: tuple, weight: float, sigmas: tuple[float, float]):
        """sound, negative: K and V (S or 1, N, channels), the second for the unconditional rows.
        sigmas: the noise levels between which the sound is heard, the higher first."""
        self.previous, self.weight, self.sigmas = previous, weight, sigmas
        self.own = {0: sound, 1: negative}
        self.moved, self.added = {}, []

    def add(self, callback, **kwargs) -> None:
        """Put another attention's addition on top: callback(out, q, k, v, extra_options, **kwargs), called
        between the noise levels kwargs["sigma_start"] and kwargs["sigma_end"]."""
        self.added.append((callback, kwargs))

    def to(self, where):
        """ComfyUI moves patches to a device or type. What is ours follows the query when it is asked."""
        if hasattr(self.previous, "to"):
            self.previous = self.previous.to(where)
        return self

    def models(self) -> list:
        return self.previous.models() if hasattr(self.previous, "models") else []

    def rows(self, q, order: list[int]) -> list:
        """K and V (B, N, channels) in the type and place of q. order: 0 for each part of the batch that is
        conditional, another number for one that is not."""
        if (q.device, q.dtype) not in self.moved:
            self.moved = {(q.device, q.dtype): {which: [part.to(q) for part in parts]
                                                for which, parts in self.own.items()}}
        held, pictures, rows = self.moved[q.device, q.dtype], len(q) // len(order), ([], [])
        for which in order:
            for part, chosen in zip(rows, held[min(which, 1)]):
                if len(chosen) not in (1, pictures):
                    raise ValueError(f"{len(chosen)} sounds for {pictures} pictures: give one sound, or as "
                                     "many as the latent batch has pictures")
                part.append(chosen.expand(pictures, -1, -1))
        return [torch.cat(part) for part in rows]

    def __call__(self, q, k, v, extra_options):
        """q (B, Q, channels), k and v of the text -> (B, Q, channels)."""
        heads, precision = extra_options["n_heads"], extra_options.get("attn_precision")
        if self.previous is None:
            out = optimized_attention(q, k, v, heads, attn_precision=precision)
        else:
            out = self.previous(q, k, v, extra_options)
        sigma = float(extra_options["sigmas"].max()) if "sigmas" in extra_options else self.sigmas[0]
        if self.weight and self.sigmas[1] <= sigma <= self.sigmas[0]:
            audio_k, audio_v = self.rows(q, extra_options.get("cond_or_uncond") or [0])
            audio = optimized_attention(q, audio_k, audio_v, heads, attn_precision=precision)
            out = out + self.weight * audio
        for callback, kwargs in self.added:
            if kwargs.get("sigma_end", 0.0) <= sigma <= kwargs.get("sigma_start", float("inf")):
                out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out.to(q.dtype)


class LoadAdapter:
    """The adapter file of a run, checked, and what its header says."""
    CATEGORY, FUNCTION = "CLAP2Diffusion", "load"
    RETURN_TYPES, RETURN_NAMES = ("CLAP2DIFFUSION_ADAPTER", "STRING"), ("adapter", "facts")
    DESCRIPTION = ("An adapter.safetensors of a run, from models/clap2diffusion or by its path. Its facts "
                   "are the second output and stand in the console.")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "adapter": ([BY_PATH, *folder_paths.get_filename_list(ADAPTERS)],),
            "path": ("STRING", {"default": "", "tooltip": f"The file, where {BY_PATH} is chosen"})}}

    @staticmethod
    def find(adapter: str, path: str) -> str:
        return os.path.expanduser(path.strip().strip("\"'")) if adapter == BY_PATH else (
            folder_paths.get_full_path(ADAPTERS, adapter) or adapter)

    @classmethod
    def IS_CHANGED(cls, adapter, path):
        found = cls.find(adapter, path)
        return os.stat(found).st_mtime_ns if os.path.isfile(found) else found

    def load(self, adapter, path):
        found = read_adapter(self.find(adapter, path))
        facts = describe(found)
        logging.info("CLAP2Diffusion: %s", facts.replace("\n", "; "))
        if found.facts.get("warning"):
            logging.warning("CLAP2Diffusion: %s: %s", found.path, found.facts["warning"])
        return found, facts


class EncodeSound:
    """What the adapter's CLAP hears in one window of each sound."""
    CATEGORY, FUNCTION = "CLAP2Diffusion", "encode"
    RETURN_TYPES, RETURN_NAMES = ("CLAP2DIFFUSION_SOUND",), ("sound",)
    DESCRIPTION = ("Sounds to CLAP's embeddings, on the CPU. Silence is the null audio. Needs the CLAP of "
                   "the adapter's training, from models/clap, Hugging Face's cache or the given folder.")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "adapter": ("CLAP2DIFFUSION_ADAPTER",), "audio": ("AUDIO",),
            "start_s": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 86400.0, "step": 0.1, "tooltip":
                        "Where the window begins, in seconds; the last one ends with the sound"}),
            "clap": ("STRING", {"default": "", "tooltip": "Folder of the CLAP; empty = the adapter's own"})}}

    def encode(self, adapter, audio, start_s, clap):
        waveforms = (audio or {}).get("waveform")  # a video without sound gives None
        if waveforms is None or waveforms.ndim != 3 or 0 in waveforms.shape[:2]:
            raise ValueError("the audio holds no sound; give the output of Load Audio, or of a video that "
                             "has one")
        rate = audio.get("sample_rate")
        if not isinstance(rate, (int, float)) or rate < 1:
            raise ValueError(f"the audio's sample rate is {rate}, expected a number of samples a second; "
                             "give the output of Load Audio")
        trained, expected = adapter.facts["clap_model"], adapter.facts["fingerprints"]["clap"]
        folder = find_clap(clap, trained, folder_paths.get_folder_paths(CLAPS))
        found = fingerprint(folder)
        if found != expected:
            raise ValueError(f"{folder}: is CLAP {found}, but {adapter.path} was trained with CLAP "
                             f"{expected} ({trained}); give that one in the field clap")
        embeds, notes = embed(folder, found, waveforms, rate, start_s)
        for note in notes:
            logging.warning("CLAP2Diffusion: %s", note)
        return ({"embeds": embeds, "clap": found},)


class ApplyAdapter:
    """The model with the adapter: it hears the sound in every cross-attention, and has the adapter's LoRA."""
    CATEGORY, FUNCTION = "CLAP2Diffusion", "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = ("Makes the model hear the sound. One sound for all pictures, or as many as the latent "
                   "batch has. The unconditional half hears silence, or the negative sound.")

    @classmethod
    def INPUT_TYPES(cls):
        number = {"min": 0.0, "max": 10.0, "step": 0.05}
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {"required": {
            "model": ("MODEL",), "adapter": ("CLAP2DIFFUSION_ADAPTER",), "sound": ("CLAP2DIFFUSION_SOUND",),
            "weight": ("FLOAT", {**number, "default": 1.0, "tooltip": "Times the learned gate"}),
            "start": ("FLOAT", {**share, "default": 0.0, "tooltip": "Heard from this share of sampling on"}),
            "end": ("FLOAT", {**share, "default": 1.0, "tooltip": "Heard until this share of sampling"}),
            "lora": ("FLOAT", {**number, "default": 1.0, "tooltip": "Of the adapter's LoRA, in all steps"})},
            "optional": {"negative": ("CLAP2DIFFUSION_SOUND",)}}

    def apply(self, model, adapter, sound, weight, start, end, lora, negative=None):
        if start >= end:
            raise ValueError(f"start {start:g} is not below end {end:g}: the sound would never be heard; "
                             "give a start below the end")
        expected = adapter.facts["fingerprints"]["clap"]
        for name, given in (("sound", sound), ("negative", negative)):
            if given and given["clap"] != expected:
                raise ValueError(f"{name}: was encoded with CLAP {given['clap']}, but {adapter.path} was "
                                 f"trained with CLAP {expected}; encode it with this adapter")
        places = self.places(model, adapter)
        embeds = sound["embeds"]
        null = negative["embeds"] if negative else torch.zeros_like(embeds[:1])
        heard, unheard = (keys_and_values(adapter, audio_tokens(adapter, one)) for one in (embeds, null))
        model = self.with_lora(model, adapter, lora)
        sampling = model.get_model_object("model_sampling")
        sigmas = float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))
        for name, (_, key) in places.items():
            there = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
            exact = key if len(key) == 3 else (*key, 0)  # ComfyUI looks for the longer key first
            key = exact if exact in there else key
            previous = there.get(key, there.get(key[:2]))
            model.set_model_attn2_replace(
                AudioAttention(previous, heard[name], unheard[name], weight, sigmas), *key)
        return (model,)

    @staticmethod
    def places(model, adapter) -> dict:
        """match_attentions() with the model's own. Raises ValueError: it is none of the adapter's kind."""
        unet = model.get_model_object("diffusion_model")
        modules = {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}
        if not modules:
            raise ValueError("the model has no UNet with cross-attentions; load a checkpoint of the kind the "
                             f"adapter was trained with ({adapter.facts['base_model']})")
        width, expected = next(iter(modules.values())).to_k.in_features, adapter.facts["dims"]["width"]
        if width != expected:
            raise ValueError(f"the model's cross-attention is {width} wide, {adapter.path} expects "
                             f"{expected}; load a checkpoint of the kind of {adapter.facts['base_model']}")
        places = match_attentions(adapter.facts["attentions"], list(modules))
        for i, name in enumerate(adapter.facts["attentions"]):
            if name in places:
                channels = len(adapter.tensors[f"ip_adapter.{i}.to_k_ip.weight"])
                found = modules[places[name][0]].to_k.out_features
                if found != channels:
                    raise ValueError(f"the model's {places[name][0]} has {found} channels, {adapter.path} "
                                     f"expects {channels}; load a checkpoint of the kind of "
                                     f"{adapter.facts['base_model']}")
        return places

    @staticmethod
    def with_lora(model, adapter, strength: float):
        """A clone of the model with the adapter's LoRA. Raises ValueError: a tensor of it has no place."""
        tensors = lora_tensors(adapter)
        if not tensors or not strength:
            return model.clone()
        known = comfy.lora.model_lora_keys_unet(model.model, {})
        lost = sorted({name.partition(".")[0] for name in tensors} - known.keys())
        if lost:
            raise ValueError(f"the model has no place for {len(lost)} layers of the adapter's LoRA, first "
                             f"{lost[0]}; load a checkpoint of the kind of {adapter.facts['base_model']}")
        return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


NODE_CLASS_MAPPINGS = {"CLAP2DiffusionLoad": LoadAdapter, "CLAP2DiffusionEncode": EncodeSound,
                       "CLAP2DiffusionApply": ApplyAdapter}
NODE_DISPLAY_NAME_MAPPINGS = {"CLAP2DiffusionLoad": "CLAP2Diffusion Load",
                              "CLAP2DiffusionEncode": "CLAP2Diffusion Encode",
                              "CLAP2DiffusionApply": "CLAP2Diffusion Apply"}

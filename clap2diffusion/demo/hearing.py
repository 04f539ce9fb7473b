"""What CLAP hears: the names nearest to a sound, by CLAP's own text tower where the model has one."""

from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from clap2diffusion.base.hub import load_small
from clap2diffusion.base.models import load_part
from clap2diffusion.base.weights import find_weights, read_config, read_tensors
from clap2diffusion.demo.own_data import plain


def has_text_side(folder: Path) -> bool:
    """Whether a CLAP folder holds the text tower and a tokenizer."""
    return (read_config(folder / "config.json").get("model_type") == "clap"
            and any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))
            and any(name.startswith("text_model.") for name in read_tensors(find_weights(folder)[1])))


class Listener:
    """Compares sounds with texts. `why`: one sentence if it cannot, or ""."""

    def __init__(self, clap: Path, texts: dict[str, str]):
        """texts: {label: what CLAP reads of it}. Raises UserError: the text tower's files are broken."""
        self.labels, self.why = [*texts], ""
        if not has_text_side(clap):
            self.why = "this CLAP has no text side, so it cannot say what it hears"
        elif not texts:
            self.why = "no labels are at hand to compare the sound with"
        else:
            self.text_embeds = embed_texts(clap, [*texts.values()])  # (labels, E)

    def most_like(self, audio_embeds: Tensor, n: int = 3) -> str:
        """The n labels whose texts are nearest to audio_embeds (1, E), with the cosines."""
        if self.why:
            return self.why
        if not audio_embeds.any():
            return "silence: no sound at all"
        near = (audio_embeds @ self.text_embeds.T)[0].topk(min(n, len(self.labels)))
        found = [f"{plain(self.labels[i])} {cosine:.2f}" for cosine, i in zip(*map(Tensor.tolist, near))]
        return f"most like: {found[0]}" + (f"; then {', '.join(found[1:])}" if found[1:] else "")


@torch.inference_mode()
def embed_texts(clap: Path, texts: list[str]) -> Tensor:
    """Texts -> (B, E) of unit length, by a CLAP folder's text tower. Raises UserError."""
    tokenizer = load_small(transformers.AutoTokenizer, clap, "CLAP model")
    tower = load_part(transformers.ClapTextModelWithProjection, clap, "CLAP model",
                      unread=("audio_model.", "audio_projection.", "logit_scale_"))
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return F.normalize(tower(**tokens).text_embeds.float(), dim=-1)

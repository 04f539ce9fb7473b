"""The judge: a SigLIP-like model that says how well a picture fits a caption, in English or Korean.

It shares no weights with the base model, CLAP or the adapter, and its training never saw a generated picture.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer, SiglipImageProcessorPil, SiglipModel

from clap2diffusion.base.device import quiet_libraries
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.hub import load_small
from clap2diffusion.base.models import load_part
from clap2diffusion.judging.clips import find_judge


class Judge:
    """Embeddings of pictures and captions in one space, from a SigLIP folder or hub name.
    Raises UserError: no such model, one that is no fixed-size SigLIP, or a tokenizer that ends no text."""

    def __init__(self, name: str | Path, device: torch.device | str = "cpu", batch_size: int = 64):
        folder = find_judge(str(name))
        quiet_libraries()
        self.model = load_part(SiglipModel, folder, "judge").to(device)
        self.processor = load_small(SiglipImageProcessorPil, folder, "judge")
        self.tokenizer = load_small(AutoTokenizer, folder, "judge")
        self.padded = {"padding": "max_length", "padding_side": "right", "truncation": True,
                       "return_tensors": "pt",
                       "max_length": self.model.config.text_config.max_position_embeddings}
        last, eos = self.tokenizer("a dog")["input_ids"][-1], self.tokenizer.eos_token_id
        if eos is None or last != eos:
            raise UserError(f"judge {name}: its tokenizer ends a text with token {last}; expected "
                            f"end-of-text, {eos}, as SigLIP learned; take the tokenizer's files as its "
                            "authors give them")
        self.device, self.batch_size = device, batch_size

    @torch.inference_mode()
    def _batches(self, items: list, embed) -> np.ndarray:
        batches = (items[at:at + self.batch_size] for at in range(0, len(items), self.batch_size))
        return np.concatenate([normalize(embed(batch).pooler_output.float(), dim=-1).cpu().double().numpy()
                               for batch in batches])

    def images(self, images: list) -> np.ndarray:
        """PIL pictures -> unit-length embeddings (n, D), float64."""
        return self._batches(images, lambda batch: self.model.get_image_features(
            pixel_values=self.processor(batch, return_tensors="pt")["pixel_values"].to(self.device)))

    def captions(self, captions: list[str]) -> np.ndarray:
        """Captions -> unit-length embeddings (m, D), float64, as SigLIP learned them: in lower case (google's
        big_vision, issue 187), with end-of-text, and padded on the right to the full length. Longer ones are
        cut, after saying so."""
        limit = self.padded["max_length"]
        whole = self.tokenizer([caption.lower() for caption in captions], verbose=False)["input_ids"]
        if cut := [caption for caption, ids in zip(captions, whole) if len(ids) > limit]:
            print(f"judge: {len(cut)} of {len(captions)} captions are longer than the {limit} tokens that it "
                  f"reads and are cut; the first is {cut[0]!r:.80}", flush=True)

        def embed(batch: list[str]):
            ids = self.tokenizer([caption.lower() for caption in batch], **self.padded)["input_ids"]
            return self.model.get_text_features(input_ids=ids.to(self.device))
        return self._batches(captions, embed)

"""Captions and prompts that are longer than a text encoder reads. No torch: the tokenizer alone counts."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from clap2diffusion.base import files, hub
from clap2diffusion.dataset.manifest import Row


class Cut(NamedTuple):
    """A text that is too long: how many tokens it has, how many are read, and the words that are left out."""
    tokens: int
    limit: int
    left_out: str

    def __str__(self) -> str:
        return f"{self.tokens} tokens, of which {self.limit} are read; left out: {self.left_out!r}"


def text_limit(base: Path) -> int:
    """The tokens that a base model's text encoder reads, with begin- and end-of-text; 77 for CLIP."""
    config, tokenizer = (files.read_json(path) if path.exists() else {} for path in (
        base / "text_encoder/config.json", base / "tokenizer/tokenizer_config.json"))
    limit = config.get("text_config", config).get("max_position_embeddings", 77)
    return int(min(limit, tokenizer.get("model_max_length") or limit))


def cut_texts(texts: Iterable[str], base: Path) -> dict[str, Cut]:
    """Those of the texts that the base model's text encoder would not read to the end."""
    limit, found = text_limit(base), {}
    # A token is at least one byte of the text in lower case, and two are special. So short ones need no look.
    long = [text for text in dict.fromkeys(texts)
            if len(unicodedata.normalize("NFC", text).lower().encode("utf-8", "replace")) > limit - 2]
    if not long:
        return {}
    import transformers  # takes a second
    tokenizer = hub.load_small(transformers.CLIPTokenizer, base, "base model", "tokenizer")
    for at in range(0, len(long), 1000):
        chunk = long[at:at + 1000]
        encoded = tokenizer(chunk, return_offsets_mapping=True, verbose=False)
        for text, ids, places in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if len(ids) > limit:  # the last that is read is end-of-text
                found[text] = Cut(len(ids), limit, text[places[limit - 1][0]:].strip())
    return found


def describe_cut(rows: list[Row], base: Path) -> str:
    """One line on the rows whose captions are cut, with the first one's place; "" if none is."""
    cut = cut_texts((row.text for row in rows), base)
    places = [row for row in rows if row.text in cut]
    if not places:
        return ""
    first = places[0]
    return (f"{len(places)} of {len(rows)} captions are longer than the base model reads and are cut; the "
            f"first is {first.where}: {cut[first.text]}")

"""Gradio's parts with the page's own checks, so that a wrong value is one sentence and nothing is fetched."""

import os
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from clap2diffusion.base.exits import UserError


def unread(part: gr.components.Component) -> gr.components.Component:
    """The part, whose values reach our functions as they came: page.checked() reads them, and Gradio's own
    check, which writes a traceback and names no part, does not."""
    part.preprocess = lambda value: value
    return part


class CheckedBlocks(gr.Blocks):
    """A gr.Blocks that checks the values of a call before Gradio reads them: by itself Gradio downloads any
    address that is given in place of a file."""

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        """Raises gr.Error with one sentence, which shows on the page and reaches a program as AppError."""
        try:
            if len(inputs) < len(block_fn.inputs):
                raise UserError(f"got {len(inputs)} values, expected {len(block_fn.inputs)}; the page's link "
                                "Use via API lists them")
            for part, value in zip(block_fn.inputs, inputs):
                check_value(part, value)
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except UserError as error:
            sentence = str(error)
        except Exception as error:  # Gradio's words on what it cannot read
            said = " ".join(str(error).split())
            sentence = f"this call cannot be read ({said:.300}); the page's link Use via API says how to call"
        raise gr.Error(sentence, print_exception=False)


def check_value(part: gr.blocks.Block, value) -> None:
    """Check what a call gives a part: a file only where a sound belongs, and only one that was uploaded.
    Raises UserError."""
    if not isinstance(part, gr.Audio):
        if isinstance(value, (dict, list)):
            raise UserError(f"{label_of(part)}: got a {type(value).__name__}, expected a text or a number")
        return
    if value is None:
        return
    file, meta = (value, value.get("meta")) if isinstance(value, dict) else ({}, None)
    path = file.get("path")
    if not isinstance(path, str) or not isinstance(meta, dict) or meta.get("_type") != "gradio.FileData":
        raise UserError(f"{label_of(part)}: got no file; with gradio_client give handle_file(PATH)")
    if not Path(os.path.abspath(path)).is_relative_to(get_upload_folder()):
        raise UserError(f"{label_of(part)}: got a file or address that was not uploaded to this page, which "
                        "fetches nothing from elsewhere; upload the sound itself")
    if not os.path.isfile(path):
        raise UserError(f"{label_of(part)}: the file is gone, since the page keeps files for an hour; give "
                        "it again")


def label_of(part: gr.blocks.Block) -> str:
    """A part's name on the page."""
    return getattr(part, "label", None) or "value"

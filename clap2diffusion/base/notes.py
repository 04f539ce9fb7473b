"""What the libraries warn of, each thing said once, and without what means nothing to our users."""

import logging
import re

NO_NOTES = re.compile("|".join((  # warnings that mean nothing to our users, by how they begin
    r"`\w+ImageProcessor` requires torchvision",  # we have no torchvision; Pillow's processor is what we use
    r"image_encoder is not loaded since",  # an embedding of CLAP takes the place of an image encoder's
    r"There are modules in \w+ that should be kept in float32: \[\]",  # the list is empty
    r"No LoRA keys associated to \w+ found with the prefix='text_encoder'",  # our LoRA is the UNet's alone
    r"Token indices sequence length is longer",  # generate.py says it of the prompt, a stage of the captions
    r"The following part of your input was truncated",  # the same once more, from the pipeline
    r"Model config: \w+_token_id must be",  # SigLIP's defaults are CLIP's tokens; the judge writes no text
    r"Some weights of",  # diffusers' words for what the next one says in transformers'
    r"\w+ LOAD REPORT",  # we ask what was missing ourselves; of CLAP the text tower is left out on purpose
    # bitsandbytes' kernel for a 4-bit UNet without gradients; diffusers and peft import it unasked
    r"Failed to load CPU gemm_4bit_forward",
)))


class _Notes(logging.Handler):
    """Prints what a library warns of once, on stdout, where of several processes one speaks."""

    def __init__(self, library: str):
        super().__init__(logging.WARNING)
        self.library, self.said = library, set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(re.sub(r"\x1b\[\d*m", "", record.getMessage()).split())  # without colours
        if text not in self.said and not NO_NOTES.match(text):
            self.said.add(text)
            print(f"note from {self.library}: {text}", flush=True)


def print_notes_of(library: str) -> None:
    """Print what a library logs as a warning as a note. The library need not be imported yet."""
    logger = logging.getLogger(library)
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(library))

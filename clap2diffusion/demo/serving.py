"""The page as a running server, until a signal ends it."""

import argparse
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from clap2diffusion.demo.own_data import OwnData

UPLOAD = "50mb"  # largest file that a page takes


def serve(args: argparse.Namespace, adapter_path: Path, facts: dict, base: Path, data: OwnData,
          pick_port: Callable[[], int]) -> None:
    """Load the models, open the page at the port that pick_port() gives, say where it is, and wait. All
    files of its sessions lie in one folder, which is removed at the end. Raises UserError as Studio does."""
    with tempfile.TemporaryDirectory(prefix="clap2diffusion-page-") as place:
        os.environ["GRADIO_TEMP_DIR"] = place  # read when gradio makes its first part
        from clap2diffusion.demo.layout import build, launch_options
        from clap2diffusion.demo.page import Page
        from clap2diffusion.demo.studio import Studio
        studio = Studio(adapter_path, facts, base, data, args.clap_model, args.device, args.precision)
        blocks = build(Page(studio, Path(place)))
        try:
            port = pick_port()
            _, _, shared = blocks.launch(
                server_name=args.host, server_port=port, share=args.share, quiet=True,
                max_file_size=UPLOAD, prevent_thread_lock=True, **launch_options())
            host = f"[{args.host}]" if ":" in args.host else args.host
            for address in filter(None, (f"http://{host}:{port}", shared)):
                print(f"open {address} (stop: Ctrl-c)", flush=True)
            threading.Event().wait()
        finally:
            blocks.close(verbose=False)

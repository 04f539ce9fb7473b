"""A page in the browser that makes pictures from sounds with a trained run, all on this machine.

    bash run_demo.sh                             # sets up what it needs, then opens runs/tiny
    python -m clap2diffusion.demo --run runs/tiny --port 7861

Tabs: one sound, two sounds, a long sound, the microphone. Each is an endpoint of the API as well, see
docs/demo.md. Nothing leaves this machine, and others can reach the page only with --host or --share."""

import argparse
import errno
import os
import socket
import sys

from clap2diffusion.base import packages
from clap2diffusion.base.exits import UserError, run_main
from clap2diffusion.base.settings import Number, model_flags, new_parser

FIRST_PORT, PORTS = 7860, 100
LOCAL = ("127.0.0.1", "localhost", "::1")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, prog="python -m clap2diffusion.demo")
    add = model_flags(parser)
    add("--data-root", default="", help="where the run's data lie now: examples ('' = where they were)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="type the models are held and run in")
    add = parser.add_argument_group("who can reach the page").add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to answer at; 0.0.0.0 = every machine of the network may use it (default: 127.0.0.1)")
    add("--port", type=Number(int, 1, 65535), metavar="N",
        help=f"port to answer at (default: {FIRST_PORT}, or the next free one)")
    add("--share", action="store_true",
        help="also make a public address through Gradio's servers: sounds and pictures pass through them")
    return parser


def is_free(host: str, port: int) -> bool:
    """Whether a server can be started there. Raises UserError: this machine has no such address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except PermissionError:
            raise UserError(f"--port {port}: needs an administrator's rights; give one above 1023") from None
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                return False
            raise UserError(f"--host {host}: is no address of this machine ({error}); give 127.0.0.1, or "
                            "0.0.0.0 for all of its addresses") from None
    return True


def pick_port(host: str, port: int | None) -> int:
    """The port that was asked for, or the first free one from FIRST_PORT on, which is said.
    Raises UserError: it is taken, or all are."""
    if port:
        if is_free(host, port):
            return port
        raise UserError(f"--port {port}: is taken by another program; give another one, or leave it out for "
                        "the next free one")
    for found in range(FIRST_PORT, FIRST_PORT + PORTS):
        if is_free(host, found):
            if found != FIRST_PORT:
                print(f"port {FIRST_PORT} is taken, so this is at {found}", flush=True)
            return found
    raise UserError(f"the ports {FIRST_PORT} to {found} are all taken; give a free one with --port")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if packages.is_missing("gradio"):
        raise UserError(f"{sys.executable} lacks gradio, which the page needs; what sets it up and opens the "
                        "page is: bash run_demo.sh")
    # Threads that wait sleep. Else they burn the cores that the browser needs for its microphone: on two busy
    # cores a picture of the tab Live takes 12 s instead of 0.4.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch and gradio load after every error that needs neither
    from clap2diffusion.demo.own_data import OwnData
    from clap2diffusion.pictures.inputs import adapter_facts, check_models, find_adapter
    adapter_path = find_adapter(args.run)
    facts = adapter_facts(adapter_path)
    base = check_models(args, facts, adapter_path)
    if args.port:
        pick_port(args.host, args.port)
    else:
        is_free(args.host, FIRST_PORT)  # whether there is such an address
    for exposed, who in ((args.share, "--share: everybody who has the address"),
                         (args.host not in LOCAL, f"--host {args.host}: everybody in your network")):
        if exposed:
            print(f"warning: {who} can use the page, and what they upload comes to this machine",
                  file=sys.stderr, flush=True)
    data = OwnData(args.data_root, adapter_path)
    if data.why:
        print(f"no examples: {data.why}", flush=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from clap2diffusion.demo.serving import serve
    # the port is picked once the models are loaded: another page may have taken one in the meantime
    serve(args, adapter_path, facts, base, data, lambda: pick_port(args.host, args.port))


if __name__ == "__main__":
    run_main(main)

"""Run a script as `python SCRIPT ...` does, but by the tests' warm process: start-up takes no five seconds.

A stand-in for `python` in a test's PATH calls this (see answer() in conftest.py).
"""

from __future__ import annotations

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as place:
    place.connect(sys.argv[1])
    place.sendall(json.dumps({"argv": sys.argv[2:], "cwd": os.getcwd()}).encode() + b"\n")
    done = json.loads(place.makefile().readline())
sys.stdout.write(done["stdout"])
sys.stderr.write(done["stderr"])
sys.exit(done["code"])

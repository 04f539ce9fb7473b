"""The machinery behind the scripts, in layers: base, dataset, pictures, engine, judging, world."""

from clap2diffusion.base import packages

packages.check()  # before any script gets to an import that would fail

"""The machinery behind the scripts, in layers: base, dataset, pictures, engine, judging, world."""

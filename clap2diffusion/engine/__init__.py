"""The upkeep of a stage's run: its folder, checkpoints, log, opening it and finishing it."""

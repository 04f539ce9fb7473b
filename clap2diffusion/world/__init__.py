"""Data that we make ourselves: the sound world, its measure in a picture, Tux Paint's stamps."""

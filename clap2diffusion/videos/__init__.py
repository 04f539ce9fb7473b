"""Videos and loose files become a data folder: lists as people have them, preparing, pairs."""

"""From a manifest to batches: rows, decoding, frozen encoders, feature cache, data set and its order."""

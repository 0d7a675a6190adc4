"""Files of a training run: names, ownership, states, metadata and uploads."""

"""The training script: preparation, the loop, its output and its state."""

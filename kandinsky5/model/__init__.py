"""The diffusion transformer: its layers, checkpoints, input, precision and offloading."""

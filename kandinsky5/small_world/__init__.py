"""A small base model trained on drawn clips, its training, and a judge of generated clips."""

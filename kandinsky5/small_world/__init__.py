"""A small base model that has learnt a drawn world, the judge of what its clips show, and its training."""

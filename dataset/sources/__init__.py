"""Lists the media of a dataset with captions and masks, and what is skipped with the reason."""

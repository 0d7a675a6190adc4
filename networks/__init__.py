"""Low-rank adapters and their file formats."""

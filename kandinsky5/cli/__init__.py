"""Command lines: the options of the four scripts and their conversion to configs."""

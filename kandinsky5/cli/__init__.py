"""Command lines: the flags of the four scripts and their way into configs."""

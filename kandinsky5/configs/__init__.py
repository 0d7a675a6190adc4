"""Frozen settings, one dataclass per command."""

"""Settings as frozen dataclasses, one per command."""

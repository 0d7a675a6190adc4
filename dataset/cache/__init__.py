"""Cache files: names, index, matching and reading."""

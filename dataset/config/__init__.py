"""The dataset file: keys, parsing and checks."""

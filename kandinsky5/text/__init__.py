"""Captions to conditioning: prompt templates, tokens and the two text encoders."""

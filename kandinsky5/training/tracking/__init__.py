"""Metrics, curves and trackers."""

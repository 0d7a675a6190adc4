"""Validation loss: measurement, schedule and plots."""

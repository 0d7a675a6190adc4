"""Estimates of memory and the plan that fits a device."""

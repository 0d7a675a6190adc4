"""Datasets: media, captions, buckets and cache files."""

"""The video VAE: files, tiles, encoding and decoding."""

"""The two caching scripts: latents and text encoder outputs."""

"""From a prompt to latents and video files, the same for training samples and generation."""

"""Sizes shared by data and model: VAE compression factors and the sizes of the pretraining.

Pure arithmetic, without torch. Letters as in the rest of the project: a clip of num_frames x height x width
pixels has [F, H, W] latent positions.
"""

from __future__ import annotations

PIXELS_PER_LATENT = 8
"""Along height and width."""
FRAMES_PER_LATENT = 4
"""Along time, after a first frame that has a latent of its own."""
LATENT_CHANNELS = 16
PIXEL_STEP = 2 * PIXELS_PER_LATENT
"""Sides are multiples of this: the DiT takes patches of 2 x 2 latents."""
NABLA_STEP = 8 * PIXEL_STEP
"""Sides are multiples of this with NABLA attention, whose blocks are 8 x 8 patches."""
FPS = 24
"""Frames a second that Kandinsky 5 was trained at."""
HD_LATENT_AREA = 14080
"""H x W of the smallest HD size (640 x 1408 pixels), from which on the HD tasks' rotary scale was trained."""


def round_frames(num_frames: int) -> int:
    """Round pixel frames down to 4k+1, the lengths that the VAE encodes without a remainder."""
    return (num_frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1


def latent_frame_count(num_frames: int) -> int:
    """F for 4k+1 pixel frames."""
    return (num_frames - 1) // FRAMES_PER_LATENT + 1


def pixel_frame_count(latent_frames: int) -> int:
    """Pixel frames, 4k+1, that make F latent frames."""
    return (latent_frames - 1) * FRAMES_PER_LATENT + 1


def pixel_size(latent_height: int, latent_width: int) -> tuple[int, int]:
    """(width, height) in pixels of H x W latent positions."""
    return latent_width * PIXELS_PER_LATENT, latent_height * PIXELS_PER_LATENT


def size_label(width: int, height: int, num_frames: int) -> str:
    """A size in pixels for logs: "672x384x25"."""
    return f"{width}x{height}x{num_frames}"


def size_step(*, uses_nabla: bool) -> int:
    """The required divisor of width and height in pixels."""
    return NABLA_STEP if uses_nabla else PIXEL_STEP

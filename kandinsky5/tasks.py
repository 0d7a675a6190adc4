"""Presets of the published checkpoints: architecture, files and sampling settings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dataset.geometry import FPS, PIXELS_PER_LATENT, pixel_frame_count, size_step
from modules.errors import ConfigError

WEIGHTS_FOLDER = Path("weights")
"""Default folder of the published models, relative to the working directory."""
SMALL_BASE_FOLDER = Path(__file__).parent / "small_world" / "base"
"""Folder of the small base model in this repository."""

MAX_LATENT_FRAMES = 128
MAX_LATENT_SIDE = 256
"""The rotary tables have 128 positions per axis: one latent frame, or two latent rows or columns, each."""
MAX_SIDE = MAX_LATENT_SIDE * PIXELS_PER_LATENT
MAX_FRAMES = pixel_frame_count(MAX_LATENT_FRAMES)
"""The same in pixels and pixel frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DitParams:
    """Constructor arguments of the DiT, under the names the official code uses."""

    in_visual_dim: int = 16
    out_visual_dim: int = 16
    in_text_dim: int = 3584
    in_text_dim2: int = 768
    time_dim: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    model_dim: int
    ff_dim: int
    num_text_blocks: int
    num_visual_blocks: int
    axes_dims: tuple[int, int, int]
    visual_cond: bool = True
    instruct_type: str | None = None

    @property
    def in_channels(self) -> int:
        """Input channels of the patch embedding: latents, and for conditioned models condition and mask."""
        has_condition = self.visual_cond or self.instruct_type == "channel"
        return 2 * self.in_visual_dim + 1 if has_condition else self.in_visual_dim

    def as_kwargs(self) -> dict[str, Any]:
        """The fields as a dict for `DiffusionTransformer3D(**...)`."""
        return asdict(self)


def override_params(params: DitParams, changes: Mapping[str, Any]) -> DitParams:
    """`params` with some fields replaced, for `--override_dit`.

    Args:
        changes: JSON values, with lists for tuples.
    Raises:
        ConfigError: names are unknown or values have the wrong type (all are listed), or the sizes do not
            divide into attention heads.
    """
    kinds = {item.name: str(item.type) for item in fields(DitParams)}
    unknown = sorted(set(changes) - set(kinds))
    problems = (
        [f"--override_dit: unknown parameters {', '.join(unknown)}; use {', '.join(kinds)}"]
        if unknown
        else []
    )
    for name in sorted(set(changes) & set(kinds)):
        fits, wanted = _KINDS[kinds[name]]
        if not fits(changes[name]):
            problems.append(f"--override_dit: {name} must be {wanted}, got {json.dumps(changes[name])}")
    if problems:
        raise ConfigError(problems)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    changed = replace(params, **values)
    if changed.model_dim % sum(changed.axes_dims) or any(dim % 2 for dim in changed.axes_dims):
        raise ConfigError(
            f"--override_dit: axes_dims {list(changed.axes_dims)} must be even, and their sum, the width of "
            f"an attention head, must divide model_dim {changed.model_dim}"
        )
    return changed


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_size, "a whole number above 0"),
    "tuple[int, int, int]": (
        lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_size, value)),
        "three whole numbers above 0, such as [1, 2, 2]",
    ),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str | None": (lambda value: value is None or isinstance(value, str), "text or null"),
}
"""Checks and descriptions of JSON values, by the type of a `DitParams` field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NablaParams:
    """NABLA block selection: a cumulative-mass threshold per head, joined with a sliding tile window."""

    P: float = 0.9
    wT: int = 11
    wH: int = 3
    wW: int = 3
    """Full window widths in blocks: latent frames, rows and columns of 8x8 token squares."""
    add_sta: bool = True
    method: str = "topcdf"

    def describe(self) -> str:
        """The settings as text, for logs."""
        window = f"window {self.wT} x {self.wH} x {self.wW}" if self.add_sta else "no window"
        return f"NABLA attention ({self.method}, P {self.P:g}, {window})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A `--task`: a checkpoint with its architecture and sampling settings."""

    name: str
    checkpoint: str
    """File name under `folder`/model/."""
    dit_params: DitParams
    resolution: int
    """512 ("SD") or 1024 ("HD"); sets the default size and the image-to-video area."""
    scale_factor: tuple[float, float, float]
    """Divisors of the rotary angles for time, height and width."""
    seconds: int
    frames: int | None = None
    """Default number of pixel frames, if it does not follow from `seconds`."""
    folder: Path = WEIGHTS_FOLDER
    """Folder of the default paths."""
    steps: int = 50
    guidance: float = 5.0
    scheduler_scale: float = 10.0
    nabla: NablaParams | None = None
    qwen_max_length: int = 256
    clip_max_length: int = 77
    is_i2v: bool = False
    """Image to video: the first frame is given."""
    is_tiny: bool = False
    """A test model: its tokenizers are not required to be Qwen's and CLIP's."""

    @property
    def default_num_frames(self) -> int:
        """Pixel frames, 4k + 1."""
        return self.frames or self.seconds * FPS + 1

    @property
    def has_built_in_guidance(self) -> bool:
        """Whether it is sampled without guidance, which its checkpoint was distilled to do without."""
        return self.guidance == 1.0

    @property
    def image_size_divisor(self) -> int:
        """The sides of an image-to-video clip are multiples of this."""
        return size_step(uses_nabla=self.resolution >= 1024 or self.nabla is not None)

    @property
    def image_max_area(self) -> int:
        """Area in pixels to which a conditioning image is scaled."""
        return {512: 512 * 768, 1024: 1024 * 1024}.get(self.resolution, self.resolution**2)

    @property
    def dit_path(self) -> Path:
        return self.folder / "model" / self.checkpoint

    @property
    def vae_path(self) -> Path:
        return self.folder / "vae"

    @property
    def text_encoder_qwen_path(self) -> Path:
        return self.folder / "text_encoder"

    @property
    def text_encoder_clip_path(self) -> Path:
        return self.folder / "text_encoder2"


PRO_PARAMS = DitParams(
    time_dim=1024,
    model_dim=4096,
    ff_dim=16384,
    num_text_blocks=4,
    num_visual_blocks=60,
    axes_dims=(32, 48, 48),
)
LITE_PARAMS = DitParams(
    time_dim=512, model_dim=1792, ff_dim=7168, num_text_blocks=2, num_visual_blocks=32, axes_dims=(16, 24, 24)
)
IMAGE_LITE_PARAMS = DitParams(
    time_dim=512,
    model_dim=2560,
    ff_dim=10240,
    num_text_blocks=2,
    num_visual_blocks=50,
    axes_dims=(32, 48, 48),
    visual_cond=False,
)
IMAGE_EDIT_LITE_PARAMS = replace(IMAGE_LITE_PARAMS, instruct_type="channel")
TINY_PARAMS = DitParams(
    in_text_dim=64,
    in_text_dim2=32,
    time_dim=64,
    model_dim=128,
    ff_dim=256,
    num_text_blocks=2,
    num_visual_blocks=4,
    axes_dims=(16, 24, 24),
)
SMALL_PARAMS = DitParams(
    in_text_dim=64,
    in_text_dim2=32,
    time_dim=64,
    model_dim=128,
    ff_dim=384,
    num_text_blocks=1,
    num_visual_blocks=5,
    axes_dims=(8, 12, 12),
)

_SD_SCALE = (1.0, 2.0, 2.0)
_HD_SCALE = (1.0, 3.16, 3.16)
_IMAGE_TASKS = ("k5-lite-t2i-hd", "k5-lite-i2i-hd")


def _video_task(
    name: str, checkpoint: str, params: DitParams, *, is_hd: bool = False, seconds: int = 5, **settings: Any
) -> Task:
    return Task(
        name=name,
        checkpoint=f"{checkpoint}.safetensors",
        dit_params=params,
        resolution=1024 if is_hd else 512,
        scale_factor=_HD_SCALE if is_hd else _SD_SCALE,
        seconds=seconds,
        **settings,
    )


def _tiny_task(name: str, **settings: Any) -> Task:
    return Task(
        name=name,
        checkpoint="tiny.safetensors",
        dit_params=TINY_PARAMS,
        resolution=128,
        scale_factor=_SD_SCALE,
        seconds=1,
        steps=8,
        is_tiny=True,
        **settings,
    )


def _small_task(name: str, **settings: Any) -> Task:
    return Task(
        name=name,
        checkpoint="small.safetensors",
        dit_params=SMALL_PARAMS,
        resolution=64,
        scale_factor=_SD_SCALE,
        seconds=1,
        frames=17,
        folder=SMALL_BASE_FOLDER,
        steps=16,
        guidance=3.0,
        scheduler_scale=3.0,
        is_tiny=True,
        **settings,
    )


_NABLA = NablaParams()
# Source: kandinskylab/kandinsky-5 configs/*.yaml; a scheduler scale left out there is the pipeline's.
_TASKS = (
    _video_task("k5-pro-t2v-5s-sd", "kandinsky5pro_t2v_sft_5s", PRO_PARAMS),
    _video_task(
        "k5-pro-t2v-5s-hd", "kandinsky5pro_t2v_sft_5s", PRO_PARAMS, is_hd=True, nabla=NablaParams(P=0.8)
    ),
    _video_task("k5-pro-t2v-10s-sd", "kandinsky5pro_t2v_sft_10s", PRO_PARAMS, seconds=10, nabla=_NABLA),
    _video_task(
        "k5-pro-t2v-10s-hd",
        "kandinsky5pro_t2v_sft_10s",
        PRO_PARAMS,
        is_hd=True,
        seconds=10,
        nabla=NablaParams(P=0.7),
    ),
    _video_task("k5-pro-i2v-5s-sd", "kandinsky5pro_i2v_sft_5s", PRO_PARAMS, is_i2v=True),
    _video_task(
        "k5-pro-i2v-5s-hd",
        "kandinsky5pro_i2v_sft_5s",
        PRO_PARAMS,
        is_hd=True,
        is_i2v=True,
        nabla=NablaParams(P=0.8),
        scheduler_scale=5.0,
    ),
    _video_task("k5-lite-t2v-5s-sd", "kandinsky5lite_t2v_sft_5s", LITE_PARAMS),
    _video_task("k5-lite-t2v-10s-sd", "kandinsky5lite_t2v_sft_10s", LITE_PARAMS, seconds=10, nabla=_NABLA),
    _video_task("k5-lite-i2v-5s-sd", "kandinsky5lite_i2v_5s", LITE_PARAMS, is_i2v=True),
    _video_task(
        "k5-lite-t2v-5s-distil-sd",
        "kandinsky5lite_t2v_distilled16steps_5s",
        LITE_PARAMS,
        steps=16,
        guidance=1.0,
        scheduler_scale=5.0,
    ),
    _video_task(
        "k5-lite-t2v-10s-distil-sd",
        "kandinsky5lite_t2v_distilled16steps_10s",
        LITE_PARAMS,
        seconds=10,
        steps=16,
        guidance=1.0,
        nabla=_NABLA,
    ),
    _video_task("k5-lite-t2v-5s-nocfg-sd", "kandinsky5lite_t2v_nocfg_5s", LITE_PARAMS, guidance=1.0),
    # The official 10 s "nocfg" configuration names the SFT file as well.
    _video_task(
        "k5-lite-t2v-10s-nocfg-sd",
        "kandinsky5lite_t2v_sft_10s",
        LITE_PARAMS,
        seconds=10,
        guidance=1.0,
        nabla=_NABLA,
    ),
    _video_task("k5-lite-t2v-5s-pretrain-sd", "kandinsky5lite_t2v_pretrain_5s", LITE_PARAMS),
    _video_task(
        "k5-lite-t2v-10s-pretrain-sd",
        "kandinsky5lite_t2v_pretrain_10s",
        LITE_PARAMS,
        seconds=10,
        nabla=_NABLA,
    ),
    _small_task("k5-small-t2v"),
    _small_task("k5-small-i2v", is_i2v=True),
    _tiny_task("k5-tiny-t2v"),
    _tiny_task("k5-tiny-i2v", is_i2v=True),
    _tiny_task("k5-tiny-nabla", nabla=NablaParams(wT=3, wH=1, wW=1)),
)
TASKS = {task.name: task for task in _TASKS}


def distilled_task(task: Task, dit: Path) -> Task | None:
    """The preset whose distilled checkpoint is used, by the name of the file; None for an undistilled one.

    A file that no preset names is taken for what the task's own checkpoint is.
    """
    named = [other for other in TASKS.values() if other.checkpoint == dit.name]
    if not all(other.has_built_in_guidance for other in named or [task]):
        return None
    return task if task in named or not named else named[0]


def undistilled_tasks(task: Task) -> list[Task]:
    """The tasks of the same model, size and length with checkpoints that are not distilled."""

    def kind(preset: Task) -> tuple[object, ...]:
        return preset.dit_params, preset.is_i2v, preset.resolution, preset.seconds

    return [
        other for other in TASKS.values() if kind(other) == kind(task) and not other.has_built_in_guidance
    ]


def get_task(name: str) -> Task:
    """The preset called `name`.

    Raises:
        ConfigError: the name is unknown (the message suggests the nearest) or an image task, which is not
            supported.
    """
    if name in TASKS:
        return TASKS[name]
    if name in _IMAGE_TASKS:
        raise ConfigError(
            f"--task {name}: the Image Lite models are not supported; use one of {', '.join(TASKS)}"
        )
    nearest = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"use one of {', '.join(TASKS)}"
    raise ConfigError(f"--task {name}: unknown task; {hint}")

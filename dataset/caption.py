"""`python -m dataset.caption` writes missing captions with the Qwen2.5-VL that is also the text encoder.

Its vision tower sees some frames of a clip, its language model describes them. Captions that exist are never
touched, so that a run which was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from dataset.media.files import Content, is_hidden, media_kind, natural_order
from dataset.media.media import Frame, MediaError, read_image
from dataset.media.videos import probe_video, read_frames
from dataset.sources.folder import CaptionFiles, check_folder
from modules.command_line import Parser, user_errors
from modules.errors import DataError, ModelFileError
from modules.files import disk_errors, write_new_text
from modules.logs import get_logger
from modules.messages import counted, lines_in_short, visible_name
from modules.options import int_between, path_text, positive_int
from modules.parsing import ParseError, parse_json
from modules.path_kinds import file_problem

log = get_logger(__name__)

Bits = Literal[4, 8]
_LANGUAGES = {
    "de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ja": "Japanese",
    "ko": "Korean", "pt": "Portuguese", "ru": "Russian", "zh": "Chinese",
}  # fmt: skip
_INSTRUCTION = (
    "Describe this {what} in one paragraph, as the prompt from which it could be made: the subject and its "
    "looks, {motion}the setting, the light, the style. State only what can be seen. Answer in {language}."
)
_MOTION = "what moves and how, in order, the camera, "
_PAD = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
_MAX_PIXELS = 256 * 28 * 28
"""Of a frame as the vision tower sees it: 256 tokens for two frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionOptions:
    """What is asked of the model."""

    language: str = "en"
    """A code of `_LANGUAGES`, or the name of another language in English."""
    trigger: str = ""
    """Put before every caption, with a comma."""
    num_frames: int = 12
    max_tokens: int = 256


class Captioner:
    """Qwen2.5-VL with its vision tower."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, options: CaptionOptions) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._processor = image_processor
        self._options = options

    def describe(self, frames: Sequence[Frame], content: Content, seconds: float = 0.0) -> str:
        """A caption of a clip, "" if the model has no words for it.

        Args:
            frames: uint8 [H, W, 3] of one size, evenly spaced; an image is one frame.
            seconds: from the first to the last of them.
        """
        import torch

        patches, grid = vision_patches(self._processor, frames)
        merge = self._processor.merge_size**2
        question = _INSTRUCTION.format(
            what=content,
            motion=_MOTION if content == "video" else "",
            language=_LANGUAGES.get(self._options.language, self._options.language),
        )
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            f"{_PAD[content] * (int(np.prod(grid)) // merge)}<|vision_end|>{question}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        device = self._model.device
        inputs = self._tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device)
        pad = self._tokenizer.convert_tokens_to_ids(_PAD[content])
        kinds = (inputs["input_ids"] == pad).long() * (1 if content == "image" else 2)
        pixels = torch.from_numpy(patches).to(device, self._model.dtype)
        seen = {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid], device=device)}
        if content == "video":
            seen = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid], device=device)}
            seen["second_per_grid_ts"] = torch.tensor([max(seconds, 0.1) / grid[0]], device=device)
        with torch.inference_mode():
            output = self._model.generate(
                **inputs, **seen, mm_token_type_ids=kinds,
                max_new_tokens=self._options.max_tokens, do_sample=False, repetition_penalty=1.05,
            )  # fmt: skip
        answer = self._tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return self._finished(answer)

    def _finished(self, answer: str) -> str:
        caption = " ".join(answer.split()).strip("\"' ")
        if not caption:
            return ""
        return f"{self._options.trigger}, {caption}" if self._options.trigger else caption


def vision_patches(processor: Any, frames: Sequence[Frame]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """What the vision tower reads of a clip, by transformers' processor for images.

    That processor doubles an image to fill a patch of two moments. Here each of two frames gives its own, as
    in transformers' processor for videos, which needs torchvision; an odd last frame stays doubled.

    Returns:
        [moments * height * width, channels * 2 * patch * patch] and (moments, height, width) in patches.
    """
    made = processor(images=[np.asarray(frame) for frame in frames], return_tensors="np")
    height, width = (int(side) for side in made["image_grid_thw"][0][1:])
    side, channels = processor.patch_size, 3
    each = made["pixel_values"].reshape(len(frames), height * width, channels, 2, side, side).copy()
    firsts, seconds = each[::2], each[1::2]
    firsts[: len(seconds), :, :, 1] = seconds[:, :, :, 1]
    return firsts.reshape(len(firsts) * height * width, -1), (len(firsts), height, width)


def load_captioner(name: str, options: CaptionOptions, device: str, bits: Bits | None) -> Captioner:
    """The model of a folder or a hub id.

    Raises:
        ModelFileError: it is no Qwen2.5-VL, lacks a part, or brings code of its own.
    """
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = Path(name)
    is_local = folder.is_dir()
    if is_local:
        _check_config(folder)
    beside = folder.parent / "tokenizer"
    tokens = name if not is_local or (folder / "tokenizer_config.json").is_file() else str(beside)
    quantised = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    plan: dict[str, Any] = {"dtype": dtype, "local_files_only": is_local, "trust_remote_code": False}
    if bits is not None:
        plan["quantization_config"] = BitsAndBytesConfig(**quantised[bits], bnb_4bit_compute_dtype=dtype)
        plan["device_map"] = {"": device}
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(name, use_safetensors=True, **plan)
        tokenizer = AutoTokenizer.from_pretrained(tokens, local_files_only=is_local, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself, transformers whatever its code meets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"--text_encoder_qwen {name}: cannot be loaded: {reason}") from error
    vision: Any = model.config.vision_config
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        size={"shortest_edge": 56 * 56, "longest_edge": _MAX_PIXELS},
    )
    if bits is None:
        torch.nn.Module.to(model, device)
    return Captioner(model.eval(), tokenizer, processor, options)


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    problem = file_problem(path)
    if problem is not None:
        raise ModelFileError(f"--text_encoder_qwen {path}: {problem}")
    try:
        config = parse_json(path.read_bytes())
    except ParseError as error:
        raise ModelFileError(f"--text_encoder_qwen {path}: not valid JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "qwen2_5_vl":
        raise ModelFileError(f"--text_encoder_qwen {folder}: describes {kind}, not Qwen2.5-VL")
    if "auto_map" in config:
        raise ModelFileError(f"--text_encoder_qwen {folder}: names code of its own (auto_map): refused")


def media_without_captions(folder: Path, extension: str) -> list[tuple[Path, Content]]:
    """The images and videos of a folder that have no caption, in their order."""
    check_folder(folder, str(folder))
    entries = sorted((path for path in folder.iterdir() if not is_hidden(path)), key=natural_order)
    captions = CaptionFiles(entries, extension)
    found: list[tuple[Path, Content]] = []
    for path in entries:
        kind = media_kind(path, "video")
        if kind in ("image", "video") and path not in captions and captions.find(path) is None:
            found.append((path, kind))
    return found


def read_evenly(path: Path, content: Content, count: int) -> tuple[list[Frame], float]:
    """Up to `count` frames that are spread evenly over a clip, and the seconds from the first to the last.

    Raises:
        MediaError: the file cannot be read.
    """
    if content == "image":
        return [read_image(path)], 0.0
    info = probe_video(path)
    numbers = sorted({round(n * (info.num_frames - 1) / max(1, count - 1)) for n in range(count)})
    seconds = float(info.times[-1] - info.times[0])
    return [frame for _, frame in read_frames(path, info, numbers)], seconds


def write_captions(
    captioner: Captioner, media: Sequence[tuple[Path, Content]], extension: str, count: int
) -> None:
    """Caption each file; what cannot be read or described is left out and named at the end.

    Raises:
        DataError: names the files without a caption.
        ResourceError: a caption cannot be written.
    """
    failed, written = [], 0
    for path, content in tqdm(media, unit="caption"):
        try:
            frames, seconds = read_evenly(path, content, count)
            caption = captioner.describe(frames, content, seconds)
        except MediaError as error:
            failed.append(f"{visible_name(path.name)}: {error.reason} ({error.detail})")
            continue
        if not caption:
            failed.append(f"{visible_name(path.name)}: the model answered nothing")
            continue
        target = path.with_suffix(extension)
        with disk_errors(target.parent, "run the same command again: it goes on where it was"):
            written += write_new_text(target, caption + "\n")
    log.info("wrote %s", counted(written, "caption"))
    if failed:
        what = counted(len(failed), "file has", "files have")
        raise DataError(f"{what} no caption:\n{lines_in_short(failed)}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m dataset.caption", "Write the captions that images and videos of a folder lack."
    )
    add = parser.add_argument
    languages = " ".join(_LANGUAGES)
    add("folder", type=Path, metavar="FOLDER", help="folder of images and videos")
    add(
        "--text_encoder_qwen",
        type=path_text,
        required=True,
        metavar="PATH",
        help="Qwen2.5-VL-7B-Instruct: a folder or a hub id",
    )
    add("--trigger", default="", metavar="WORD", help="put before every caption")
    add("--language", default="en", help=f"{languages}, or the name of another language (default: en)")
    add(
        "--frames",
        type=int_between(1, 64),
        default=12,
        metavar="N",
        help="frames of a video that the model sees (default: 12)",
    )
    add(
        "--max_tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="longest caption in tokens (default: 256)",
    )
    add("--bits", type=int, choices=get_args(Bits), help="load the model in 4 or 8 bits (needs a GPU)")
    add("--caption_extension", default=".txt", metavar="EXT", help="of caption files (default: .txt)")
    add("--device", help="where to compute (default: cuda if there is one, else cpu)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors(argv):
        given = _parse(argv)
        media = media_without_captions(given.folder, given.caption_extension)
        log.info("%s: %s without a caption", given.folder, counted(len(media), "file"))
        if not media:
            return
        from modules.devices import pick_device

        options = CaptionOptions(
            language=given.language,
            trigger=given.trigger,
            num_frames=given.frames,
            max_tokens=given.max_tokens,
        )
        device = str(pick_device(given.device, None))
        captioner = load_captioner(given.text_encoder_qwen, options, device, given.bits)
        write_captions(captioner, media, given.caption_extension, given.frames)


if __name__ == "__main__":
    main()

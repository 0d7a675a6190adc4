"""A folder as people have them, with one of each fault that `--check` and the preview report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.dataset.media_tools import cut_file, write_video

MARKUP = (
    '<script>document.title = "run"</script><img src=x onerror=alert(1)> "quoted" & \u202egpj.exe \x1b[31m'
)


def moving(colour: tuple[int, int, int], count: int, size: tuple[int, int] = (48, 80)) -> list[np.ndarray]:
    """Frames in which a disc crosses a coloured ground."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    frames = []
    for number in range(count):
        frame = np.full((height, width, 3), colour, np.uint8)
        centre = width * (number + 1) / (count + 1)
        frame[(x - centre) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2] = (250, 240, 230)
        frames.append(frame)
    return frames


def write_untidy(root: Path) -> Path:
    """The folder `clips` and a dataset file for it; returns the dataset file."""
    clips = root / "clips"
    (clips / "more").mkdir(parents=True)
    good = moving((40, 90, 160), 20)
    write_video(clips / "good.mp4", good)
    write_video(clips / "copy of good.mp4", good)
    write_video(clips / "phone 30 fps.mp4", moving((60, 120, 60), 24), fps=30)
    write_video(clips / "two scenes.mp4", [*moving((150, 60, 60), 7), *moving((230, 220, 80), 13)])
    write_video(clips / "short.mp4", moving((90, 90, 90), 4))
    write_video(clips / "half.mp4", moving((90, 60, 120), 9))
    write_video(clips / "no words.mp4", moving((30, 130, 140), 18))
    write_video(clips / "no caption.mp4", moving((200, 120, 60), 18))
    write_video(clips / "cut off.mp4", moving((20, 20, 20), 30))
    cut_file(clips / "cut off.mp4", 0.6)
    write_video(clips / "markup <b>.mp4", moving((120, 40, 130), 18))
    (clips / "empty.mp4").write_bytes(b"")
    (clips / "photo.jpg").write_bytes(b"x")
    (clips / "scan.psd").write_bytes(b"x")
    (clips / "._good.mp4").write_bytes(b"x")
    (clips / "latin.mp4").write_bytes((clips / "good.mp4").read_bytes())
    (clips / "latin.txt").write_bytes("café".encode("latin-1"))
    (clips / "lost.txt").write_text("a caption of nothing", encoding="utf-8")
    captions = {
        "good": "a white disc rolls over a blue floor, from left to right",
        "copy of good": "a white disc rolls over a blue floor",
        "phone 30 fps": "a white disc rolls over grass",
        "two scenes": "a white disc, then another one in the sun",
        "short": "a disc",
        "half": "a disc on violet paper",
        "no words": " \n",
        "cut off": "a disc in the dark",
        "markup <b>": MARKUP,
        "empty": "nothing",
        "photo": "a photo",
        "scan": "a scan",
    }
    for name, caption in captions.items():
        (clips / f"{name}.txt").write_text(caption, encoding="utf-8")
    path = root / "dataset.toml"
    path.write_text(
        f"""
[[datasets]]
video_directory = "{clips.as_posix()}"
cache_directory = "{(root / "cache").as_posix()}"
caption_extension = ".txt"
resolution = [80, 48]
target_frames = [5, 17]
""",
        encoding="utf-8",
    )
    return path

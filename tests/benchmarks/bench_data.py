"""The data side: a 720p clip to its bucket, a long clip in bounded memory, and caches to a batch.

    python bench_data.py [--part video memory caches] [--rounds 5] [--work DIR]

Contestants for the clip are the usual reader (PyAV, a PIL image per frame, Lanczos), the same with OpenCV's area
filter, and this project's reader, which shrinks in the pass of swscale that converts the colours. The filter of
reference for PSNR is OpenCV's INTER_AREA on RGB frames. Files are made in a temporary folder.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import av
import common as C
import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.buckets import plan_crop
from dataset.cache.files import LatentCacheMeta, read_latent_cache, write_latent_cache
from dataset.clips import cut_batches, load_batches, load_clip, plan_clips
from dataset.config.config import VideoDatasetConfig
from dataset.sources.listing import list_items

MEDIA = Path(__file__).resolve().parents[1] / "media"
SIZE, FRAMES = (1280, 720), 121
PARTS = ("video", "memory", "caches")
OURS, USUAL, AREA = "this project", "PyAV + PIL Lanczos", "PyAV + OpenCV area"


# ---- a clip to its bucket ----------------------------------------------------------------------


def drawn_frames():
    """Moving gradients: the clip that the goal was set with."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    for i in range(FRAMES):
        yield np.stack([(x + 3 * i) % 256, (y * 2 + i) % 256, (x + y + 5 * i) % 256], -1).astype(np.uint8)


def photo_frames():
    """A pan over a photo."""
    photo = Image.open(MEDIA / "coffee.jpg").resize((1600, 1066), Image.Resampling.LANCZOS)
    pixels = np.asarray(photo)
    for i in range(FRAMES):
        yield np.ascontiguousarray(pixels[i : i + SIZE[1], 2 * i : 2 * i + SIZE[0]])


def write_clip(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 1, 1
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=1)))
        container.mux(stream.encode())
    return path


def cropped(frame, plan, bucket):
    (x, y), (width, height) = plan.offset, bucket
    return frame[y : y + height, x : x + width]


def usual(path, bucket):
    plan = plan_crop(SIZE, bucket)
    with av.open(str(path)) as container:
        images = (frame.to_image() for frame in container.decode(video=0))
        resized = (np.array(image.resize(plan.resized, Image.Resampling.LANCZOS)) for image in images)
        return np.stack([cropped(pixels, plan, bucket) for pixels in resized])


def area(path, bucket):
    plan = plan_crop(SIZE, bucket)
    with av.open(str(path)) as container:
        frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        resized = (cv2.resize(pixels, plan.resized, interpolation=cv2.INTER_AREA) for pixels in frames)
        return np.stack([cropped(pixels, plan, bucket) for pixels in resized])


def video_dataset(folder, resolution, **settings):
    return VideoDatasetConfig(
        index=0,
        origin="bench",
        cache_directory=folder,
        video_directory=folder,
        caption_extension=".txt",
        resolution=resolution,
        target_frames=(FRAMES,),
        **settings,
    )


def ours(path, bucket):
    """Planned and read as the cache script does."""
    dataset = video_dataset(path.parent, bucket)
    (clip,) = plan_clips(dataset, list_items(dataset), nabla_resize=False).clips
    return load_clip(clip)


def psnr(found, reference):
    """Of the worst frame, in dB."""
    worst = max(np.square(a.astype(np.float32) - b).mean() for a, b in zip(found, reference, strict=True))
    return 10 * np.log10(255**2 / worst) if worst else float("inf")


def bench_video(folder, rounds):
    ratios = []
    for kind, frames in (("gradients", drawn_frames()), ("photo", photo_frames())):
        (folder / kind).mkdir()
        path = write_clip(folder / kind / "clip.mp4", frames)
        path.with_suffix(".txt").write_text("caption")
        for bucket in ((768, 512), (832, 464), (960, 544)):
            readers = {USUAL: usual, AREA: area, OURS: ours}
            reference = area(path, bucket)
            quality = {name: psnr(read(path, bucket), reference) for name, read in readers.items()}
            notes = {name: f"PSNR {value:.1f} dB" for name, value in quality.items()}
            calls = {name: lambda read=read: read(path, bucket) for name, read in readers.items()}
            times = C.interleave(calls, rounds, 0)
            C.report(f"{FRAMES} frames of 1280x720, {kind}, to {bucket[0]}x{bucket[1]}", times, USUAL, notes)
            ratios.append((C.ratio(times, OURS, USUAL), quality[OURS]))
    worst, lowest = max(ratio for ratio, _ in ratios), min(quality for _, quality in ratios)
    print(f"\nlargest ratio {worst:.3f} (goal at most 0.30), lowest PSNR {lowest:.1f} dB (goal at least 40)")
    return worst, lowest


# ---- memory of a long clip -----------------------------------------------------------------------


def write_long_clip(path, minutes):
    """The photo clip over and over: its packets are copied with later times."""
    short = write_clip(path.with_name("short.mp4"), photo_frames())
    with av.open(str(short)) as reader:
        template = reader.streams.video[0]
        packets = [packet for packet in reader.demux(template) if packet.size]
        step = FRAMES * packets[0].duration
        content = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe, p.time_base) for p in packets]
        with av.open(str(path), "w") as writer:
            stream = writer.add_stream_from_template(template)
            for turn in range(round(minutes * 60 * 24 / FRAMES)):
                for body, pts, dts, duration, is_key, time_base in content:
                    packet = av.Packet(body)
                    packet.pts, packet.dts, packet.duration = pts + turn * step, dts + turn * step, duration
                    packet.is_keyframe, packet.time_base, packet.stream = is_key, time_base, stream
                    writer.mux(packet)
    short.unlink()
    return path


def bench_memory(folder, minutes=10):
    clips = folder / "long"
    clips.mkdir()
    path = write_long_clip(clips / "long.mp4", minutes)
    path.with_suffix(".txt").write_text("caption")
    dataset = video_dataset(clips, (768, 512), enable_bucket=True, frame_extraction="chunk")
    print(f"\n### a clip of {minutes} minutes, 1280x720, in chunks of {FRAMES} frames at 832x464")
    print("| readers | clips | frames | peak above the start, MiB | pixels of one clip, MiB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for num_workers in (1, 2):
        with C.AnonymousPeak() as peak:
            made = plan_clips(dataset, list_items(dataset), nabla_resize=False, num_workers=num_workers)
            frames = 0
            for batch in load_batches(cut_batches(made.clips, 1), num_workers=num_workers):
                frames += sum(len(pixels) for pixels in batch.pixels)
            del batch
        width, height = made.clips[0].crop
        clip = FRAMES * width * height * 3 / 2**20
        print(f"| {num_workers} | {len(made.clips)} | {frames} | {peak.mib:.0f} | {clip:.0f} |", flush=True)


# ---- caches --------------------------------------------------------------------------------------


def bench_caches(folder, rounds, count=24):
    """Latents of 5 s at 768x512, as they are cached and read for a batch."""
    meta = LatentCacheMeta(
        width=768, height=512, frame_count=121, frame_start=0, crop="768x512", fps="all", dtype="bfloat16",
        vae_tile="none", source_fingerprint="none", encoder_fingerprint="none",
    )  # fmt: skip
    paths = []
    for number in range(count):
        path = folder / f"{number}_00000-121_0768x0512_k5.safetensors"
        latents = torch.randn(16, 31, 64, 96)
        write_latent_cache(path, latents, latents[:, [0, -1]], meta)
        paths.append(path)
    mib = paths[0].stat().st_size / 2**20
    readers = {
        "load_file": lambda path: torch.stack([next(iter(load_file(path).values()))]),
        OURS: lambda path: torch.stack([read_latent_cache(path, "video").latents]),
    }
    calls = {n: lambda read=read: [read(path) for path in paths] for n, read in readers.items()}
    times = C.interleave(calls, rounds, 1)
    notes = {name: f"{1000 * min(ts) / count:.2f} ms an item of {mib:.1f} MiB" for name, ts in times.items()}
    C.report("a latent cache to a batch (pages in memory)", times, "load_file", notes)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--work", help="where to make the temporary folder")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        if "video" in args.part:
            bench_video(Path(folder), args.rounds)
        if "memory" in args.part:
            bench_memory(Path(folder))
        if "caches" in args.part:
            bench_caches(Path(folder), args.rounds)


if __name__ == "__main__":
    main()

"""Buckets and crops against tables worked out by hand from the rules users know."""

from __future__ import annotations

import pytest

from dataset.buckets import bucket_sizes, choose_bucket, nabla_size, plan_crop


@pytest.mark.parametrize(
    ("resolution", "count", "first", "middle", "last"),
    [
        ((960, 544), 47, (352, 1472), (720, 720), (1472, 352)),
        ((768, 512), 41, (304, 1280), (624, 624), (1280, 304)),
        ((512, 512), 33, (256, 1024), (512, 512), (1024, 256)),
        ((256, 256), 17, (128, 512), (256, 256), (512, 128)),
    ],
)
def test_a_resolution_has_the_known_bucket_list(
    resolution: tuple[int, int],
    count: int,
    first: tuple[int, int],
    middle: tuple[int, int],
    last: tuple[int, int],
) -> None:
    buckets = bucket_sizes(resolution, enable_bucket=True)
    assert len(buckets) == count
    assert (buckets[0], buckets[count // 2], buckets[-1]) == (first, middle, last)


def test_512_has_exactly_these_buckets() -> None:
    words = (
        "256x1024 272x960 288x896 304x848 320x816 336x768 352x736 368x704 384x672 400x640 416x624 432x592 "
        "448x576 464x560 480x544 496x528 512x512"
    )
    upper = [tuple(map(int, word.split("x"))) for word in words.split()]
    expected = sorted({*upper, *((h, w) for w, h in upper)})
    assert list(bucket_sizes((512, 512), enable_bucket=True)) == expected


def test_without_buckets_there_is_only_the_resolution() -> None:
    assert bucket_sizes((960, 544), enable_bucket=False) == ((960, 544),)


@pytest.mark.parametrize(
    ("resolution", "source", "bucket", "resized", "offset"),
    [
        ((960, 544), (1920, 1080), (960, 544), (967, 544), (3, 0)),
        ((960, 544), (1080, 1920), (544, 960), (544, 967), (0, 3)),
        ((960, 544), (1000, 1000), (720, 720), (720, 720), (0, 0)),
        ((512, 512), (1920, 1080), (672, 384), (683, 384), (5, 0)),
        ((512, 512), (640, 480), (592, 432), (592, 444), (0, 6)),
        ((768, 512), (1280, 720), (832, 464), (832, 468), (0, 2)),
        ((512, 512), (300, 200), (624, 416), (624, 416), (0, 0)),
        ((512, 512), (2000, 400), (1024, 256), (1280, 256), (128, 0)),
    ],
)
def test_a_source_goes_to_the_known_bucket_by_the_known_crop(
    resolution: tuple[int, int],
    source: tuple[int, int],
    bucket: tuple[int, int],
    resized: tuple[int, int],
    offset: tuple[int, int],
) -> None:
    buckets = bucket_sizes(resolution, enable_bucket=True)
    assert choose_bucket(source, resolution, buckets, bucket_no_upscale=False) == bucket
    crop = plan_crop(source, bucket)
    assert (crop.resized, crop.offset) == (resized, offset)


def test_no_upscale_keeps_small_sources_and_only_those() -> None:
    buckets = bucket_sizes((512, 512), enable_bucket=True)
    assert choose_bucket((500, 300), (512, 512), buckets, bucket_no_upscale=True) == (496, 288)
    assert choose_bucket((600, 600), (512, 512), buckets, bucket_no_upscale=True) == (512, 512)


@pytest.mark.parametrize(
    ("bucket", "rounded"),
    [((512, 512), (512, 512)), ((592, 432), (640, 512)), ((672, 384), (768, 384)), ((16, 144), (128, 256))],
)
def test_nabla_sizes_are_the_next_multiples_of_128(bucket: tuple[int, int], rounded: tuple[int, int]) -> None:
    assert nabla_size(bucket) == rounded


def test_a_resized_frame_always_covers_its_target() -> None:
    for width in range(17, 400, 13):
        for height in range(17, 400, 29):
            crop = plan_crop((width, height), (160, 96))
            assert crop.resized[0] >= 160
            assert crop.resized[1] >= 96

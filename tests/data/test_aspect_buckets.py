"""Buckets keep the area, and an image goes to that of the nearest shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.data.aspect_buckets import choose_bucket, make_buckets


@given(st.integers(128, 2048))
def test_buckets_have_about_the_area_and_every_shape_both_ways(resolution: int) -> None:
    buckets = make_buckets(resolution)
    assert len(set(buckets)) == len(buckets)
    for width, height in buckets:
        assert width % 64 == height % 64 == 0
        assert width * height <= resolution**2
        assert (height, width) in buckets
    square = resolution // 64 * 64
    assert (square, square) in buckets


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_chosen_bucket_is_the_nearest(width: int, height: int) -> None:
    buckets = make_buckets(512)
    chosen = choose_bucket((width, height), buckets)
    errors = [abs(w / h - width / height) for w, h in buckets]
    assert abs(chosen[0] / chosen[1] - width / height) == min(errors)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 1000), (512, 512)), ((3000, 2000), (640, 384)), ((900, 1600), (384, 640))],
)
def test_known_buckets(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert choose_bucket(size, make_buckets(512)) == expected

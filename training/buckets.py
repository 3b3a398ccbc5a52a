"""Which size an image is trained at: one square, or the bucket nearest to its shape, at one or more resolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

BUCKETINGS = ("square", "aspect")
Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that images are brought to.

    Args:
        resolution: side of the square, or of the square whose area no bucket exceeds; pixels, a multiple of 8.
        further: more resolutions; every image is trained at each.
        bucketing: "square", or "aspect": the bucket nearest to the image's shape.
        bucket_step: sides of buckets are multiples of this, pixels, itself a multiple of 8.
        max_aspect: long side over short side of the longest buckets, at least 1.
        no_upscale: with "aspect", an image smaller than its bucket gets one that it fills without being enlarged.

    Raises:
        ValueError: a value out of its range.
    """

    resolution: int
    further: tuple[int, ...] = ()
    bucketing: str = "square"
    bucket_step: int = 64
    max_aspect: float = 2.0
    no_upscale: bool = False

    def __post_init__(self) -> None:
        _require_multiple_of_8("resolution", self.resolution)
        for resolution in self.further:
            _require_multiple_of_8("resolutions", resolution)
        if self.bucketing not in BUCKETINGS:
            raise ValueError(f"bucketing must be one of {', '.join(BUCKETINGS)}, not {self.bucketing!r}")
        if self.bucketing == "aspect":
            _require_multiple_of_8("bucket_step", self.bucket_step)
            if not 1 <= self.max_aspect < math.inf:
                raise ValueError(f"max_aspect must be at least 1 (2 is usual), not {self.max_aspect}")
            if self.bucket_step > min(self.resolutions):
                raise ValueError(
                    f"bucket_step must not be larger than the resolution {min(self.resolutions)},"
                    f" but is {self.bucket_step}; 64 is usual"
                )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((self.resolution, *self.further)))

    def of(self, width: int, height: int) -> tuple[Size, ...]:
        """The sizes at which an image of width × height pixels is trained, each once."""
        if self.bucketing == "square":
            return tuple((resolution, resolution) for resolution in self.resolutions)
        sizes = (nearest_bucket(width, height, r, self.bucket_step, self.max_aspect) for r in self.resolutions)
        if self.no_upscale:
            sizes = (_filled(width, height, size, self.bucket_step) for size in sizes)
        return tuple(dict.fromkeys(sizes))


@dataclass(frozen=True)
class Placement:
    """An image scaled to cover a target and cropped in the middle; pixels of the scaled image.

    Args:
        width, height: of the scaled image.
        left, top: where the target begins.
        right: columns cut off on the right, which is `left` of the mirrored image.
    """

    width: int
    height: int
    left: int
    top: int
    right: int


def cover(original: Size, target: Size) -> Placement:
    """Scales `original` by max(target / original), rounded to pixels, and crops the middle (odd pixels: less left)."""
    scale = max(target[0] / original[0], target[1] / original[1])
    width, height = (max(t, round(o * scale)) for o, t in zip(original, target, strict=True))
    left, top = (width - target[0]) // 2, (height - target[1]) // 2
    return Placement(width, height, left, top, width - target[0] - left)


@lru_cache(maxsize=64)
def bucket_sizes(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """All buckets, narrow ones first: for every side the largest other side with an area of at most resolution².

    Args:
        resolution, step: pixels, step not larger than resolution.
        max_aspect: long over short side; the square bucket is always there.
    """
    square = resolution // step * step
    found = {(square, square)}
    for short in range(step, square, step):
        long = resolution * resolution // short // step * step
        if long <= short * max_aspect:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))


@lru_cache(maxsize=4096)
def nearest_bucket(width: int, height: int, resolution: int, step: int, max_aspect: float) -> Size:
    """The bucket with the smallest |log(aspect) - log(width/height)|; of equals the larger, then the narrower."""
    aspect = math.log(width / height)

    def distance(size: Size) -> tuple[float, int, int]:
        return round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1], size[0]

    return min(bucket_sizes(resolution, step, max_aspect), key=distance)


def parsed_resolutions(text: str) -> tuple[int, ...]:
    """ "768, 1024" -> (768, 1024); "" -> ().

    Raises:
        ValueError: a part is no whole number.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise ValueError(f"resolutions takes pixels separated by commas ('768, 1024') or nothing, not {wrong[0]!r}")
    return tuple(int(part) for part in parts)


def _filled(width: int, height: int, bucket: Size, step: int) -> Size:
    """The bucket, cut to what the image fills without being enlarged, in steps; at least one step."""
    return tuple(max(step, min(b, side // step * step)) for b, side in zip(bucket, (width, height), strict=True))  # type: ignore[return-value]


def _require_multiple_of_8(name: str, value: int) -> None:
    if value < 8 or value % 8:
        raise ValueError(f"{name} must be a multiple of 8 and at least 8, not {value}")

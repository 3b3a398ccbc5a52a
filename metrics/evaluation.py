"""Everything that is measured of two sets of images, in one call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .coverage import NEIGHBOURS, precision_recall, require_enough
from .features import EXTRACTORS, INCEPTION, inception_features, pixel_features
from .frechet import frechet_distance
from .kernel import kernel_distance


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Args:
        features: that the images were compared by.
        samples, reference: how many images.
        width: of the features.
        frechet, kernel: distances, 0 for equal sets; smaller is better.
        precision, recall: in [0, 1]; larger is better.
    """

    features: str
    samples: int
    reference: int
    width: int
    frechet: float
    kernel: float
    precision: float
    recall: float

    def report(self) -> str:
        """In words, with what the numbers can be trusted for."""
        lines = [
            f"{self.samples} images against {self.reference} by {self.features} ({self.width} features)",
            f"Fréchet distance {self.frechet:.4g}, kernel distance {self.kernel:.4g}",
            f"precision {self.precision:.3f}, recall {self.recall:.3f}",
        ]
        if min(self.samples, self.reference) <= self.width:
            lines.append(
                f"with no more images than features ({self.width}) the Fréchet distance is too large: compare only sets"
                " of equal size by it, or go by the kernel distance"
            )
        return "\n".join(lines)


def evaluated(
    samples: Tensor, reference: Tensor, features: str, weights: Path, neighbours: int = NEIGHBOURS
) -> Evaluation:
    """Fréchet and kernel distance, precision and recall of images against others.

    Args:
        samples, reference: (N, H, W, 3), (M, H, W, 3) in [0, 1]; of unlike sizes if need be.
        features: of EXTRACTORS.
        weights: Inception's, looked at where it is asked for.
        neighbours: of precision and recall; N and M are above.

    Raises:
        ValueError: unknown features, too few images, missing weights.
    """
    if features not in EXTRACTORS:
        raise ValueError(f"features must be one of {', '.join(EXTRACTORS)}, not {features!r}")
    require_enough(len(samples), len(reference), neighbours)
    one, two = (
        inception_features(pictures, weights) if features == INCEPTION else pixel_features(pictures)
        for pictures in (samples, reference)
    )
    precision, recall = precision_recall(one, two, neighbours)
    distances = frechet_distance(one, two), kernel_distance(one, two)
    return Evaluation(features, len(one), len(two), one.shape[1], *distances, precision, recall)

"""How good a model's images are, against real ones."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..metrics.coverage import NEIGHBOURS
from ..metrics.evaluation import evaluated
from ..metrics.features import EXTRACTORS, INCEPTION_FILE
from .errors import names_node
from .widgets import choice, count


class Diff2FlowEvaluate:
    """Compares a batch of images with a batch of reference images."""

    CATEGORY = "Diff2Flow/evaluation"
    FUNCTION = "evaluate"
    RETURN_TYPES = ("STRING", "FLOAT", "FLOAT", "FLOAT", "FLOAT")
    RETURN_NAMES = ("report", "frechet", "kernel", "precision", "recall")
    OUTPUT_TOOLTIPS = (
        "All numbers in words, with what they can be trusted for.",
        "Fréchet distance (FID with Inception's features): 0 for equal sets, smaller is better.",
        "Kernel distance (KID with Inception's features), not biased by the number of images; may be just below 0.",
        "Share of the samples that lie among the reference, 0 to 1: low where images look wrong.",
        "Share of the reference that lies among the samples, 0 to 1: low where there is little variety.",
    )
    DESCRIPTION = (
        "Measures how near a model's images are to real ones, such as samples before and after finetuning to the"
        " training images: Fréchet distance, kernel distance, precision and recall. Give at least some dozens of each;"
        " published numbers take thousands."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "samples": ("IMAGE", {"tooltip": "The images to judge: a batch of at least 4, better hundreds."}),
                "reference": ("IMAGE", {"tooltip": "What they should be like: real images, at least 4, of any size."}),
                "features": choice(
                    EXTRACTORS,
                    "pixels",
                    "What images are compared by. pixels: mean colours of 4 × 4 fields, which see colour and rough"
                    " shape and need no file. inception: the network that FID is defined by; needs torch-fidelity and"
                    f" its file {INCEPTION_FILE} in models/metrics.",
                ),
            },
            "optional": {
                "neighbours": count(
                    NEIGHBOURS, 1, 100, "Nearest neighbours by which precision and recall tell what lies among a set; 3"
                    " is usual, more are more lenient. Both batches need more images than this."
                ),
            },
        }  # fmt: skip

    @names_node("Diff2Flow Evaluate")
    def evaluate(
        self, samples: Any, reference: Any, features: str, neighbours: int = NEIGHBOURS
    ) -> tuple[str, float, float, float, float]:
        weights = current().folder("metrics") / INCEPTION_FILE
        found = evaluated(samples, reference, features, weights, neighbours)
        return found.report(), found.frechet, found.kernel, found.precision, found.recall

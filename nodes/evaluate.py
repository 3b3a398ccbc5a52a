"""How good a model and its images are: by features against real images, by captions, and by the flow itself."""

from __future__ import annotations

import math
from typing import Any

from ..files import confined
from ..hosts import current
from ..hosts.choice import flow_of
from ..metrics.coverage import NEIGHBOURS
from ..metrics.features import EXTRACTORS, INCEPTION_FILE
from .effects import tells_the_page
from .errors import names_node
from .running import note_patches
from .widgets import choice, count, line, seed, text


@tells_the_page
class Diff2FlowEvaluate:
    """Compares a batch of images with a batch of reference images; on request, judges captions and the model's flow."""

    CATEGORY = "Diff2Flow/evaluation"
    FUNCTION = "evaluate"
    RETURN_TYPES = ("STRING", "FLOAT", "FLOAT", "FLOAT", "FLOAT", "FLOAT", "FLOAT", "FLOAT")
    RETURN_NAMES = (
        "report", "frechet", "kernel", "precision", "recall", "clip_score", "straightness", "flow_matching_loss",
    )  # fmt: skip
    OUTPUT_TOOLTIPS = (
        "All numbers in words, with what they can be trusted for.",
        "Fréchet distance (FID with Inception's features): 0 for equal sets, smaller is better.",
        "Kernel distance (KID with Inception's features), not biased by the number of images; may be just below 0.",
        "Share of the samples that lie among the reference, 0 to 1: low where images look wrong.",
        "Share of the reference that lies among the samples, 0 to 1: low where there is little variety.",
        "How well the samples show their captions, 0 to 100; not a number (nan) without clip_model.",
        "How far the model's paths are from straight lines, 0 is straight; nan without model and dataset.",
        "Flow matching loss on the dataset at fixed times, smaller is better; nan without model and dataset.",
    )
    SEARCH_ALIASES = ("FID", "KID", "CLIP score", "precision recall", "Inception", "image quality")
    DESCRIPTION = (
        "Measures how near a model's images are to real ones, such as samples before and after finetuning to the"
        " training images: Fréchet distance, kernel distance, precision and recall; with captions and a CLIP model the"
        " CLIP score; with the model and a dataset its flow matching loss and how straight its paths are. Give at least"
        " some dozens of images each; published numbers take thousands."
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
                "captions": text(
                    "", "What the samples should show, for the CLIP score: one line for all of them, or one for each.",
                    multiline=True,
                ),
                "clip_model": line(
                    "", "Folder in models/metrics with a CLIP model as transformers saves it, for the CLIP score; empty"
                    " for none. Needs torchmetrics."
                ),
                "model": ("MODEL", {"tooltip": "The model whose flow is judged, with its LoRA; needs a dataset, too."}),
                "dataset": (
                    "D2F_DATASET",
                    {"tooltip": "Images with captions that the flow is judged on, better ones that the model was not"
                     " trained on; the first 32 count."},
                ),
                "seed": seed("Seed of the noise that the flow is judged with."),
            },
        }  # fmt: skip

    @names_node("Diff2Flow Evaluate")
    def evaluate(
        self,
        samples: Any,
        reference: Any,
        features: str,
        neighbours: int = NEIGHBOURS,
        captions: str = "",
        clip_model: str = "",
        model: Any = None,
        dataset: Any = None,
        seed: int = 0,
    ) -> tuple[str, float, float, float, float, float, float, float]:
        from ..metrics.evaluation import evaluated
        from ..metrics.text_fit import caption_of_each, clip_score
        from ..training.flow_quality import flow_quality

        folder = current().folder("metrics")
        found = evaluated(samples, reference, features, folder / INCEPTION_FILE, neighbours)
        reports, fit, straight, loss = [found.report()], math.nan, math.nan, math.nan
        if _wanted_together({"captions": captions.strip(), "clip_model": clip_model.strip()}):
            fit = clip_score(samples, caption_of_each(captions, len(samples)), confined(folder, clip_model.strip()))
            reports.append(f"CLIP score {fit:.4g}")
        if _wanted_together({"model": model, "dataset": dataset}):
            what = "have no effect on straightness and loss, which are those of the bare network"
            note_patches(current(), model, what)
            with current().training(model) as backbone:
                flow = flow_quality(backbone, dataset, flow_of(current().facts(model)), seed)
            straight, loss = flow.paths.mean, flow.losses["loss"]
            reports.append(flow.report())
        distances = (found.frechet, found.kernel, found.precision, found.recall)
        return "\n".join(reports), *distances, fit, straight, loss


def _wanted_together(given: dict[str, Any]) -> bool:
    """Whether two inputs are given; ValueError for one without the other."""
    there = [name for name, value in given.items() if value is not None and value != ""]
    if len(there) == 1:
        [lacking] = set(given) - set(there)
        raise ValueError(f"{there[0]} is given without {lacking}: give {lacking}, too, or leave both empty")
    return bool(there)

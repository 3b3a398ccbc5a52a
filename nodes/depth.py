"""Nodes that learn and estimate depth."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..depth.choices import LAYOUTS, REDUCTIONS, UNITS
from ..depth.colors import COLORS, POLARITIES, shown_depth
from ..files import confined
from ..hosts import current
from ..hosts.choice import NOISES, START_CHOICES
from ..samplers import SOLVERS
from ..training.buckets import Sizes
from .datasets import CLIP, VAE, DatasetNode, bucket_inputs, encoders_of, folder_named, resolution_input
from .effects import tells_the_page
from .errors import names_node
from .products import lost
from .running import note, written
from .widgets import choice, count, line, number, seed, switch

CATEGORY = "Diff2Flow/depth"


@tells_the_page
class Diff2FlowDepthDataset(DatasetNode):
    """Encodes a folder of images with their depth for training, once."""

    SEARCH_ALIASES = ("train depth", "Hypersim", "Virtual KITTI", "Marigold training")
    DESCRIPTION = (
        "Turns images and their true depth into latents for Diff2Flow Train, which then learns to estimate depth. Depth"
        " is taken as its logarithm between the 1st and 99th percentile of each image; what is not valid does not"
        " count. Everything is kept on disk (models/datasets), as with Diff2Flow Image Dataset."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"folder": _folder_input(), "vae": VAE, "clip": CLIP, "resolution": resolution_input()},
            "optional": {**_depth_inputs(), **_size_inputs()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, folder: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return folder is None or bool(folder_named(folder))
        except ValueError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(
        cls,
        folder: str | None = None,
        vae: Any = None,
        clip: Any = None,
        resolution: int | None = None,
        layout: str | None = None,
        unit: str | None = None,
        max_depth: float | None = None,
        flips: bool | None = None,
        bucketing: str | None = None,
        bucket_step: int | None = None,
        max_aspect: float | None = None,
    ) -> str:
        """Another string when a file in the folder or below was added, removed or changed, or what was encoded is
        gone."""
        from ..depth.layouts import folder_state

        gone = lost("Diff2FlowDepthDataset", {"folder": folder, "resolution": resolution})
        return "" if folder is None else f"{folder_state(folder_named(folder))} {gone}"

    @names_node("Diff2Flow Depth Dataset")
    def build(
        self,
        folder: str,
        vae: Any,
        clip: Any,
        resolution: int,
        layout: str = "auto",
        unit: str = "auto",
        max_depth: float = 0.0,
        flips: bool = False,
        bucketing: str = "square",
        bucket_step: int = 64,
        max_aspect: float = 2.0,
    ) -> tuple[Any, str]:
        from ..training.depth_folder import DepthSettings, depth_dataset

        host = current()
        sizes = Sizes(resolution, (), bucketing, bucket_step, max_aspect)
        settings = DepthSettings(sizes, layout, unit, max_depth, flips)
        path, cache = folder_named(folder), confined(host.folder("datasets"), folder)
        dataset = depth_dataset(
            path,
            cache,
            settings,
            encoders_of(host, vae, clip),
            lambda total: host.progress(total, f"Encoding {path.name}"),
        )
        written(cache)
        return dataset, dataset.summary()


@tells_the_page
class Diff2FlowDepth:
    """Estimates the depth of images or of a video's frames."""

    CATEGORY = CATEGORY
    FUNCTION = "estimate"
    RETURN_TYPES = ("IMAGE", "IMAGE", "IMAGE")
    RETURN_NAMES = ("depth", "raw", "uncertainty")
    OUTPUT_TOOLTIPS = (
        "The depth picture, for looking at and for ControlNet.",
        "Depth as it is, in floats: near 0, far 1, the logarithm of depth up to scale and shift. Save it with Diff2Flow"
        " Save Depth; Save Image would cut it to 8 bits.",
        "How far the ensemble's estimates lie apart, in the unit of raw; 0 for an ensemble of 1.",
    )
    SEARCH_ALIASES = ("depth map", "Marigold", "monocular depth", "depth estimation", "depth video")
    DESCRIPTION = (
        "Depth of an image or of every frame of a video, by a Stable Diffusion model with a depth LoRA, in 2 to 10"
        " steps along the flow."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": _estimate_inputs(), "optional": _more_inputs()}

    @names_node("Diff2Flow Depth")
    def estimate(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        image: Any,
        steps: int,
        ensemble: int,
        resolution: int,
        seed: int,
        polarity: str = "near_white",
        colours: str = "grey",
        noise: str = "fixed",
        reduction: str = "median",
        solver: str = "euler",
        batch_size: int = 4,
        start: str = "auto",
    ) -> tuple[Any, Any, Any]:
        from ..depth.sockets import as_image
        from ..hosts.depth_estimation import DepthPlan, estimate

        if noise != NOISES[0] and len(image) == 1:
            note(f"noise ({noise!r}) has no effect: it counts where image has several frames")
        plan = DepthPlan(steps, solver, seed, ensemble, reduction, resolution, noise, batch_size, start)
        shown = partial(shown_depth, polarity=polarity, colours=colours)
        found = estimate(current(), model, clip, vae, image, plan)
        return shown(found.depth), as_image(found.depth), as_image(found.uncertainty)


def _folder_input() -> Any:
    return line(
        "my_depth",
        "A folder inside ComfyUI's input folder, by name: images/a.png (jpg, jpeg, webp, bmp, tif, tiff) with"
        " depth/a.exr (npy, npz, hdf5, h5, 16-bit png), or a.png with a_depth.exr;"
        " or Hypersim, or Virtual KITTI 2 as they are unpacked. Depth has its image's size.",
    )


def _depth_inputs() -> dict[str, Any]:
    return {
        "layout": choice(
            LAYOUTS,
            "auto",
            "folders: images and depth by name. hypersim: distances to the camera are made depth. vkitti2: centimetres,"
            " 80 m and more are sky. auto: whichever it is.",
        ),
        "unit": choice(
            UNITS, "auto", "Layout folders only: unit of the depth files. auto: 16-bit PNG millimetres, else metres."
        ),
        "max_depth": number(
            0.0, 100_000.0, 0.5, "Metres from which on depth does not count, such as sky: 80 outdoors. 0: no limit."
        ),
        "flips": switch(
            False, "Encodes every pair mirrored, too, and training shows either with probability 1/2. Good for depth."
        ),
    }


def _size_inputs() -> dict[str, Any]:
    """One resolution, as a square or in buckets."""
    inputs = bucket_inputs()
    return {name: inputs[name] for name in ("bucketing", "bucket_step", "max_aspect")}


def _estimate_inputs() -> dict[str, Any]:
    return {
        "model": ("MODEL", {"tooltip": "A checkpoint's model with a depth LoRA on it, from Diff2Flow LoRA Loader."}),
        "clip": (
            "CLIP",
            {"tooltip": "The checkpoint's text encoder: depth LoRAs are trained on the empty prompt."},
        ),
        "vae": ("VAE", {"tooltip": "The checkpoint's autoencoder."}),
        "image": ("IMAGE", {"tooltip": "An image, or the frames of a video. Any size; depth has the same."}),
        "steps": count(
            10,
            1,
            1000,
            "Steps along the flow, 2 to 10; connect what Diff2Flow LoRA Loader recommends.",
        ),
        "ensemble": count(
            1,
            1,
            64,
            "Estimates from different noise that are brought to one scale and merged; each costs as much as the first."
            " 4 to 10 smooth out what is random, and tell where the estimate is uncertain.",
        ),
        "resolution": count(
            0,
            0,
            8192,
            "Longer side in pixels that is estimated at; depth is brought back to the image's own size. 0: what the"
            " LoRA was trained at, 768 if it does not say. Much larger sizes lose the whole for the detail.",
            step=8,
        ),
        "seed": seed("Seed of the noise. The same seed gives the same depth."),
    }


def _more_inputs() -> dict[str, Any]:
    return {
        "polarity": choice(
            POLARITIES, "near_white", "Of the depth picture. near_white: what depth ControlNets want. raw keeps near 0."
        ),
        "colours": choice(COLORS, "grey", "Colour map of the depth picture; grey for ControlNet."),
        "noise": choice(
            NOISES,
            "fixed",
            "fixed: all frames begin with the same noise, which keeps a video from flickering. fresh: each with its"
            " own.",
        ),
        "reduction": choice(
            REDUCTIONS, "median", "How an ensemble is merged. median: outliers do not count; mean: smoother."
        ),
        "solver": choice(SOLVERS, "euler", "How the path is followed; euler, one network call a step."),
        "batch_size": count(4, 1, 4096, "Frames in one call of the network; more is faster and takes more memory."),
        "start": choice(START_CHOICES, "auto", "Where sampling begins; auto: where the LoRA was trained to begin."),
    }

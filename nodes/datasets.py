"""Nodes that make datasets for training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import confined
from ..hosts import current
from ..training.buckets import BUCKETINGS, Sizes, parsed_resolutions
from ..training.captions import EMBEDDING
from ..training.choices import ALPHAS
from .effects import tells_the_page
from .errors import names_node
from .products import lost
from .running import written
from .widgets import Widget, choice, count, line, number, switch, text

if TYPE_CHECKING:
    from ..training.encoding import Encoders

CATEGORY = "Diff2Flow/training"
VAE = ("VAE", {"tooltip": "The autoencoder of the checkpoint that is trained."})
CLIP = ("CLIP", {"tooltip": "The text encoder of the checkpoint that is trained."})
_FLIPS = switch(
    False,
    "Encodes every image mirrored, too, and training shows either with probability 1/2. Good for few"
    " images; leave it off for text, faces and anything whose left and right differ.",
)
_MASK_FLOOR = number(
    0.0,
    1.0,
    0.05,
    "Weight of what a mask leaves out, from 0 (does not count) to 1 (counts in full); 0 to 0.2."
    " Changing it encodes nothing anew.",
    rounding=None,
)
_WEIGHTS = switch(
    False,
    "Whether round brackets in captions weigh words, as in prompts: (word:1.2). Off: they are letters, as in"
    " 'saber (fate)'; \\( and \\) are letters either way.",
)


class DatasetNode:
    """What the nodes that make a dataset hand out."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("D2F_DATASET", "STRING")
    RETURN_NAMES = ("dataset", "summary")
    OUTPUT_TOOLTIPS = (
        "Latents and text embeddings for Diff2Flow Train.",
        "What is in the dataset: images, sizes, captions, and files that were skipped, by name and number.",
    )


@tells_the_page
class Diff2FlowImageDataset(DatasetNode):
    """Encodes a folder of images and captions for training, once."""

    SEARCH_ALIASES = ("training images", "load image folder", "captions", "aspect ratio buckets", "kohya folder")
    DESCRIPTION = (
        "Turns a folder of images with .txt captions into latents and text embeddings. They are kept on disk"
        " (models/datasets): a second run encodes only what is new or changed, an interrupted one goes on where it was."
        " Unreadable images are skipped and named in the log and in the summary."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"folder": _folder_input(), "vae": VAE, "clip": CLIP, "resolution": resolution_input()},
            "optional": {
                **_caption_inputs(),
                **bucket_inputs(),
                "flips": _FLIPS,
                **_mask_inputs(),
                "caption_weights": _WEIGHTS,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, folder: str | None = None, resolutions: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            parsed_resolutions(resolutions or "")
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
        trigger: str | None = None,
        default_caption: str | None = None,
        bucketing: str | None = None,
        bucket_step: int | None = None,
        max_aspect: float | None = None,
        resolutions: str | None = None,
        no_upscale: bool | None = None,
        flips: bool | None = None,
        alpha: str | None = None,
        mask_floor: float | None = None,
        caption_weights: bool | None = None,
    ) -> str:
        """Another string when a file in the folder or its N_name folders, or a textual inversion, was added, removed or
        changed, or when what was encoded is gone."""
        from ..training.folders import folder_state

        gone = lost("Diff2FlowImageDataset", {"folder": folder, "resolution": resolution})
        if folder is None:
            return ""
        return f"{folder_state(folder_named(folder))}{current().inversions_state()} {gone}"

    @names_node("Diff2Flow Image Dataset")
    def build(
        self,
        folder: str,
        vae: Any,
        clip: Any,
        resolution: int,
        trigger: str = "",
        default_caption: str = "",
        bucketing: str = "square",
        bucket_step: int = 64,
        max_aspect: float = 2.0,
        resolutions: str = "",
        no_upscale: bool = False,
        flips: bool = False,
        alpha: str = "white",
        mask_floor: float = 0.0,
        caption_weights: bool = False,
    ) -> tuple[Any, str]:
        from ..training.image_folder import FolderSettings, image_dataset

        host = current()
        further = parsed_resolutions(resolutions)
        sizes = Sizes(resolution, further, bucketing, bucket_step, max_aspect, no_upscale)
        settings = FolderSettings(sizes, trigger, default_caption, flips, alpha, mask_floor, caption_weights)
        path = folder_named(folder)
        cache = confined(host.folder("datasets"), folder)
        encoders = encoders_of(host, vae, clip)
        dataset = image_dataset(
            path, cache, settings, encoders, lambda total: host.progress(total, f"Encoding {path.name}")
        )
        written(cache)
        return dataset, dataset.summary()


@tells_the_page
class Diff2FlowImages(DatasetNode):
    """Encodes images of the graph and their captions for training, once."""

    SEARCH_ALIASES = ("training images", "image batch to dataset", "captions")
    DESCRIPTION = (
        "Turns images straight from the graph into latents and text embeddings for training, alone or together with"
        " another dataset. They are kept on disk by the images' content: the same image is never encoded twice."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": _batch_inputs(), "optional": _more_batch_inputs()}

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return name is None or bool(_cache_folder(name))
        except ValueError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, name: str | None = None, captions: str | None = None, **_: Any) -> str:
        """Another string when a textual inversion that the captions may name was added, removed or changed, or when what
        was encoded is gone."""
        gone = lost("Diff2FlowImages", {"name": name, "captions": captions})
        return f"{inversions_state([captions])} {gone}"

    @names_node("Diff2Flow Images")
    def build(
        self,
        images: Any,
        captions: str,
        vae: Any,
        clip: Any,
        mask: Any = None,
        repeats: int = 1,
        flips: bool = False,
        name: str = "graph_images",
        dataset: Any = None,
        mask_floor: float = 0.0,
        caption_weights: bool = False,
    ) -> tuple[Any, str]:
        from ..training.image_batch import BatchSettings, batch_dataset

        host = current()
        settings = BatchSettings(name, repeats, flips, mask_floor, caption_weights)
        made = batch_dataset(
            images,
            captions,
            mask,
            _cache_folder(name),
            settings,
            encoders_of(host, vae, clip),
            lambda total: host.progress(total, f"Encoding {name}"),
        )
        written(_cache_folder(name))
        made = made if dataset is None else dataset.joined(made)
        return made, made.summary()


def _folder_input() -> Widget:
    return line(
        "my_images",
        "A folder inside ComfyUI's input folder, by name ('my_images', 'styles/ink'): png, jpg (jpeg, jfif), webp, bmp,"
        " tif (tiff, also in floating point) or gif (its first frame), and avif, heic (heif) or jxl where the installed"
        " Pillow reads them; 10 to 100 for a style. The caption of ink.png is ink.txt (or ink.caption) beside it."
        " Subfolders called N_name as in kohya's trainer (10_ink) are read with N repeats; others are not read."
        " Transparency is laid on white.",
    )


def resolution_input() -> Widget:
    """Side of the training images."""
    return count(
        512,
        8,
        4096,
        "Side of the training images in pixels, a multiple of 8 (of 64 for full-size checkpoints). 512"
        " for SD1.x, 768 for SD2.x v, 1024 for SDXL. Images are scaled to cover the square, or with bucketing"
        " 'aspect' a shape of at most its area, and cropped in the middle.",
        step=8,
    )


def _caption_inputs() -> dict[str, Any]:
    return {
        "trigger": line(
            "",
            "Word or phrase put in front of every caption, with a comma ('inkstyle'). Use it in prompts"
            " to call the style. Empty: captions as they are.",
        ),
        "default_caption": line(
            "",
            "Caption of images that have no caption file ('a drawing'). Empty: in N_name folders it is"
            " the name, elsewhere a missing caption is an error that names the files. An empty .txt is a caption,"
            " too: an empty one.",
        ),
    }


def bucket_inputs() -> dict[str, Any]:
    """Which sizes images are brought to."""
    return {
        "bucketing": choice(
            BUCKETINGS,
            "square",
            "square: every image is cropped to resolution × resolution. aspect: images keep about their"
            " shape, sorted into sizes of at most that area; a batch has images of one size.",
        ),
        "bucket_step": count(
            64,
            8,
            512,
            "With bucketing 'aspect': sides are multiples of this, in pixels. 64 is usual; 32 crops less"
            " and makes more sizes.",
            step=8,
        ),
        "max_aspect": number(
            2.0,
            8.0,
            0.1,
            "With bucketing 'aspect': long side over short side of the longest sizes; 2 is usual. Longer"
            " images are cropped to it.",
            minimum=1.0,
            rounding=None,
        ),
        "resolutions": line(
            "",
            "Further resolutions in pixels, separated by commas ('768, 1024'): every image is trained at"
            " each of them as well. Empty: only the one above.",
        ),
        "no_upscale": switch(
            False,
            "With bucketing 'aspect': images smaller than their size are not enlarged, they are cropped"
            " to a smaller one (multiples of bucket_step).",
        ),
    }


def _mask_inputs() -> dict[str, Any]:
    return {
        "alpha": choice(
            ALPHAS,
            "white",
            "white: transparency is laid on white and trained like the rest. mask: the same, and"
            " transparent parts do not count in the loss; a grey file ink.mask.png or ink-masklabel.png beside"
            " ink.png, of its size, takes the place of its transparency (white counts).",
        ),
        "mask_floor": _MASK_FLOOR,
    }


def _batch_inputs() -> dict[str, Any]:
    return {
        "images": (
            "IMAGE",
            {"tooltip": "Images to train on, taken in the size they have; sides must be multiples of 8 px."},
        ),
        "captions": text(
            "",
            "A line for each image, in their order, or one line for all of them. An empty line is an empty caption.",
            multiline=True,
        ),
        "vae": VAE,
        "clip": CLIP,
    }


def _more_batch_inputs() -> dict[str, Any]:
    return {
        "mask": (
            "MASK",
            {
                "tooltip": "Weight of the loss, 1 where it counts, of the images' size; one for each image or one for"
                " all. Load Image gives 1 for transparent: put Invert Mask between to train what is opaque.",
            },
        ),
        "repeats": count(
            1, 1, 10_000, "How often each image counts in an epoch; 1, or more to weigh it against the other dataset."
        ),
        "flips": _FLIPS,
        "name": line(
            "graph_images", "Folder inside models/datasets that keeps the encoded images; several nodes may share one."
        ),
        "dataset": (
            "D2F_DATASET",
            {"tooltip": "Another dataset, of the same VAE and CLIP, that these images are added to."},
        ),
        "mask_floor": _MASK_FLOOR,
        "caption_weights": _WEIGHTS,
    }


def inversions_state(prompts: Iterable[str | None]) -> str:
    """A string that changes with the files of textual inversions, where prompts may name one; None: it is linked."""
    return current().inversions_state() if any(each is None or EMBEDDING in each for each in prompts) else ""


def folder_named(folder: str) -> Path:
    """The folder by its name inside the input folder; ValueError if it is not there."""
    try:
        path = current().path("input", folder)
    except ValueError as error:
        raise ValueError(f"folder: {error}") from error
    if not path.is_dir():
        raise ValueError(f"folder: '{folder}' is a file; give the name of the folder that it is in")
    return path


def _cache_folder(name: str) -> Path:
    """The folder by its name inside the datasets folder; ValueError if the name is not allowed."""
    try:
        return confined(current().folder("datasets"), name)
    except ValueError as error:
        raise ValueError(f"name: {error}") from error


def encoders_of(host: Any, vae: Any, clip: Any) -> Encoders:
    """The host's encoders, with what tells others' weights apart."""
    from ..training.encoding import Encoders

    def text(caption: str) -> tuple[Any, Any]:
        context, extra = host.encode_text(clip, caption)[0][:2]
        return context, extra.get("pooled_output")

    def image(pixels: Any) -> Any:
        return host.encode_image(vae, pixels)

    ids = host.fingerprint(vae), host.fingerprint(clip)
    return Encoders(image, text, *ids, lambda names: host.inversions(clip, names))

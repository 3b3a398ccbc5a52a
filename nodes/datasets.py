"""Nodes that make datasets for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import confined
from ..hosts import current
from ..training.encoding import Encoders, image_dataset
from ..training.images import folder_state
from .errors import names_node

CATEGORY = "Diff2Flow/training"


class Diff2FlowImageDataset:
    """Encodes a folder of images and captions for training, once."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("D2F_DATASET", "STRING")
    RETURN_NAMES = ("dataset", "summary")
    OUTPUT_TOOLTIPS = (
        "Latents and text embeddings for Diff2Flow Train.",
        "What is in the dataset: images, captions, and files that were skipped, by name and number.",
    )
    DESCRIPTION = (
        "Turns a folder of images with .txt captions into latents and text embeddings. They are kept on disk"
        " (models/datasets): a second run encodes only what is new or changed, an interrupted one goes on where it was."
        " Unreadable images are skipped and named in the log and in the summary."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "folder": (
                    "STRING",
                    {
                        "default": "my_images",
                        "tooltip": "A folder inside ComfyUI's input folder, by name ('my_images', 'styles/ink'): png,"
                        " jpg, webp, bmp or tiff, 10 to 100 for a style. The caption of ink.png is ink.txt beside it;"
                        " subfolders are not read. Transparency is laid on white.",
                    },
                ),
                "vae": ("VAE", {"tooltip": "The autoencoder of the checkpoint that is trained."}),
                "clip": ("CLIP", {"tooltip": "The text encoder of the checkpoint that is trained."}),
                "resolution": (
                    "INT",
                    {
                        "default": 512,
                        "min": 8,
                        "max": 4096,
                        "step": 8,
                        "tooltip": "Side of the training images in pixels, a multiple of 8 (of 64 for full-size"
                        " checkpoints). 512 for SD1.x, 768 for SD2.x v, 1024 for SDXL. Images are scaled to cover the"
                        " square and cropped in the middle.",
                    },
                ),
            },
            "optional": {
                "trigger": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Word or phrase put in front of every caption, with a comma ('inkstyle'). Use it in"
                        " prompts to call the style. Empty: captions as they are.",
                    },
                ),
                "default_caption": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Caption of images that have no .txt ('a drawing'). Empty: a missing caption is an"
                        " error that names the files. An empty .txt is a caption, too: an empty one.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, folder: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return folder is None or bool(_image_folder(folder))
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
    ) -> str:
        """Another string when a file in the folder was added, removed or changed."""
        return "" if folder is None else folder_state(_image_folder(folder))

    @names_node("Diff2Flow Image Dataset")
    def build(
        self, folder: str, vae: Any, clip: Any, resolution: int, trigger: str = "", default_caption: str = ""
    ) -> tuple[Any, str]:
        host = current()
        path = _image_folder(folder)
        dataset = image_dataset(
            path,
            confined(host.folder("datasets"), folder),
            resolution,
            _encoders(host, vae, clip),
            lambda total: host.progress(total, f"Encoding {path.name}"),
            trigger,
            default_caption,
        )
        return dataset, dataset.summary()


def _image_folder(folder: str) -> Path:
    """The folder by its name inside the input folder; ValueError if it is not there."""
    try:
        path = current().path("input", folder)
    except ValueError as error:
        raise ValueError(f"folder: {error}") from error
    if not path.is_dir():
        raise ValueError(f"folder: '{folder}' is a file; give the name of the folder that it is in")
    return path


def _encoders(host: Any, vae: Any, clip: Any) -> Encoders:
    def text(caption: str) -> tuple[Any, Any]:
        context, extra = host.encode_text(clip, caption)[0][:2]
        return context, extra.get("pooled_output")

    def image(pixels: Any) -> Any:
        return host.encode_image(vae, pixels)

    return Encoders(image, text, host.fingerprint(vae), host.fingerprint(clip))

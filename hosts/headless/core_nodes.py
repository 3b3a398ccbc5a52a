"""ComfyUI's core nodes that workflows around ours use, under their own ids and with their own inputs.

VALIDATE_INPUTS is given the inputs that are values; those that are links have the default.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .. import current
from ..port import HostError
from .workflow import closest

logger = logging.getLogger(__name__)

SAMPLERS = ["euler"]
SCHEDULERS = ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"]

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SIZE = ("INT", {"default": 512, "min": 16, "max": 16384, "step": 8, "tooltip": "Pixels."})
_ORIGINAL = "The size of the picture that training would have taken it from, pixels."
_SEED = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "tooltip": "Seed of the noise."})
_STEPS = ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": "Steps."})
_CFG = ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "tooltip": "Classifier-free guidance scale; 1 is none."})
_DENOISE = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "tooltip": "Part of the noise range that is walked."})
_STRENGTH = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "tooltip": "Factor of the LoRA."})
_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


class CheckpointLoaderSimple:
    """MODEL, CLIP and VAE of a checkpoint."""

    RETURN_TYPES, FUNCTION = ("MODEL", "CLIP", "VAE"), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ckpt_name": (current().names("checkpoints"),)}}

    def load(self, ckpt_name: str) -> tuple[Any, Any, Any]:
        loaded = current().load_checkpoint(ckpt_name)
        base = loaded[0].base
        if base.layout.family == "SD1" and base.prediction == "v":
            logger.warning(
                "'%s' is an SD1.x checkpoint marked as v prediction. ComfyUI's own nodes take it for eps: load it there"
                " by Diff2Flow Checkpoint Loader, or put ModelSamplingDiscrete (v_prediction) behind Load Checkpoint",
                ckpt_name,
            )
        return loaded


class LoraLoader:
    """Adds a LoRA to MODEL and CLIP."""

    RETURN_TYPES, FUNCTION = ("MODEL", "CLIP"), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        loras = (current().names("loras"),)
        strengths = {"strength_model": _STRENGTH, "strength_clip": _STRENGTH}
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "lora_name": loras, **strengths}}

    def load(
        self, model: Any, clip: Any, lora_name: str, strength_model: float, strength_clip: float
    ) -> tuple[Any, Any]:
        from .lora import apply_lora, read_lora, trained_metadata

        if strength_model == 0 and strength_clip == 0:
            return model, clip
        path = current().path("loras", lora_name)
        state = read_lora(path, lora_name)
        return apply_lora(model, clip, state, (strength_model, strength_clip), trained_metadata(path))


class LoraLoaderModelOnly(LoraLoader):
    """Adds a LoRA to MODEL."""

    RETURN_TYPES, FUNCTION = ("MODEL",), "load_model"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "lora_name": (current().names("loras"),), "strength_model": _STRENGTH}
        }

    def load_model(self, model: Any, lora_name: str, strength_model: float) -> tuple[Any]:
        return (self.load(model, None, lora_name, strength_model, 0.0)[0],)


class CLIPTextEncode:
    """CONDITIONING of a prompt."""

    RETURN_TYPES, FUNCTION = ("CONDITIONING",), "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {"multiline": True}), "clip": ("CLIP",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, text: str = "") -> bool:
        from .prompts import refuse_embeddings

        refuse_embeddings(text)
        return True

    def encode(self, text: str, clip: Any) -> tuple[Any]:
        return (current().encode_text(clip, text),)


class CLIPTextEncodeSDXL:
    """CONDITIONING of a prompt for each of SDXL's two text encoders, and of the sizes that SDXL is told."""

    RETURN_TYPES, FUNCTION = ("CONDITIONING",), "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sizes = {name: _pixels(1024, tip) for name, tip in (("width", _ORIGINAL), ("height", _ORIGINAL))}
        sizes |= {name: _pixels(0, "What was cropped off, pixels.") for name in ("crop_w", "crop_h")}
        sizes |= {name: _pixels(1024, "The picture's size, pixels.") for name in ("target_width", "target_height")}
        texts = {name: ("STRING", {"multiline": True}) for name in ("text_g", "text_l")}
        return {"required": {"clip": ("CLIP",), **sizes, **texts}}

    @classmethod
    def VALIDATE_INPUTS(cls, text_g: str = "", text_l: str = "") -> bool:
        return CLIPTextEncode.VALIDATE_INPUTS(text_g) and CLIPTextEncode.VALIDATE_INPUTS(text_l)

    def encode(
        self,
        clip: Any,
        width: int,
        height: int,
        crop_w: int,
        crop_h: int,
        target_width: int,
        target_height: int,
        text_g: str,
        text_l: str,
    ) -> tuple[Any]:
        sizes = {"width": width, "height": height, "crop_w": crop_w, "crop_h": crop_h}
        sizes |= {"target_width": target_width, "target_height": target_height}
        encoded = current().encode_texts(clip, {"l": text_l, "g": text_g})
        return ([[context, {**more, **sizes}] for context, more in encoded],)


class ConditioningZeroOut:
    """CONDITIONING with zeros in place of the text."""

    RETURN_TYPES, FUNCTION = ("CONDITIONING",), "zero_out"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def zero_out(self, conditioning: Any) -> tuple[Any]:
        pooled = "pooled_output"
        return (
            [
                [context * 0.0, {**more, pooled: more[pooled] * 0.0} if pooled in more else dict(more)]
                for context, more in conditioning
            ],
        )


class EmptyLatentImage:
    """LATENT of zeros."""

    RETURN_TYPES, FUNCTION = ("LATENT",), "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"width": _SIZE, "height": _SIZE, "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096})}
        }

    def generate(self, width: int, height: int, batch_size: int) -> tuple[Any]:
        import torch

        return ({"samples": torch.zeros(batch_size, 4, height // 8, width // 8)},)


class LoadImage:
    """IMAGE and MASK of a file in the input folder; 'name [output]' reads the output folder."""

    RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (_image_names(), {"image_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str | None = None) -> bool | str:
        try:
            return image is None or bool(_image_path(image))
        except HostError as error:
            return f"{error} (images there: {closest(image, _image_names()) or 'none'})"

    def load(self, image: str) -> tuple[Any, Any]:
        from .images import load_image

        return load_image(_image_path(image))


class EmptyImage:
    """IMAGE of one colour, 0xRRGGBB."""

    RETURN_TYPES, FUNCTION = ("IMAGE",), "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = ("INT", {"default": 512, "min": 1, "max": 16384, "tooltip": "Pixels."})
        batch = ("INT", {"default": 1, "min": 1, "max": 4096})
        color = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFF, "tooltip": "0xRRGGBB as a number."})
        return {"required": {"width": side, "height": side, "batch_size": batch, "color": color}}

    def generate(self, width: int, height: int, batch_size: int, color: int) -> tuple[Any]:
        import torch

        parts = torch.tensor([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF]) / 0xFF
        return (parts.expand(batch_size, height, width, 3).contiguous(),)


class VAEEncode:
    """LATENT of an IMAGE."""

    RETURN_TYPES, FUNCTION = ("LATENT",), "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",)}}

    def encode(self, pixels: Any, vae: Any) -> tuple[Any]:
        return ({"samples": current().encode_image(vae, pixels)},)


class VAEDecode:
    """IMAGE of a LATENT."""

    RETURN_TYPES, FUNCTION = ("IMAGE",), "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",)}}

    def decode(self, samples: Mapping[str, Any], vae: Any) -> tuple[Any]:
        return (current().decode_image(vae, samples["samples"]),)


class KSampler:
    """LATENT sampled with one of the stock samplers."""

    RETURN_TYPES, FUNCTION = ("LATENT",), "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        settings = {
            "seed": _SEED,
            "steps": _STEPS,
            "cfg": _CFG,
            "sampler_name": (SAMPLERS,),
            "scheduler": (SCHEDULERS,),
        }
        sides = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "latent_image": ("LATENT",)}
        return {"required": {"model": ("MODEL",), **settings, **sides, "denoise": _DENOISE}}

    def sample(
        self,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: Any,
        denoise: float,
    ) -> tuple[Any]:
        sampler = KSamplerSelect().select(sampler_name)[0]
        sigmas = _sigmas(model, scheduler, steps, denoise)
        return (current().sample(model, positive, negative, latent_image, seed, sampler, sigmas, cfg),)


class KSamplerSelect:
    """A stock sampler as SAMPLER."""

    RETURN_TYPES, FUNCTION = ("SAMPLER",), "select"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sampler_name": (SAMPLERS,)}}

    def select(self, sampler_name: str) -> tuple[Any]:
        from .sampling import euler

        return (current().sampler({"euler": euler}[sampler_name], {}),)


class BasicScheduler:
    """SIGMAS of a stock scheduler."""

    RETURN_TYPES, FUNCTION = ("SIGMAS",), "build"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "scheduler": (SCHEDULERS,), "steps": _STEPS, "denoise": _DENOISE}}

    def build(self, model: Any, scheduler: str, steps: int, denoise: float) -> tuple[Any]:
        return (_sigmas(model, scheduler, steps, denoise)[-(steps + 1) :],)


class SamplerCustom:
    """LATENT sampled with any SAMPLER and SIGMAS, and its last x_data_hat."""

    RETURN_TYPES, FUNCTION = ("LATENT", "LATENT"), "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sides = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
        settings = {"add_noise": ("BOOLEAN", {"default": True}), "noise_seed": _SEED, "cfg": _CFG}
        last = {"sampler": ("SAMPLER",), "sigmas": ("SIGMAS",), "latent_image": ("LATENT",)}
        return {"required": {"model": ("MODEL",), **settings, **sides, **last}}

    def sample(
        self,
        model: Any,
        add_noise: bool,
        noise_seed: int,
        cfg: float,
        positive: Any,
        negative: Any,
        sampler: Any,
        sigmas: Any,
        latent_image: Any,
    ) -> tuple[Any, Any]:
        from .sampling import sample, seeded_noise

        noise = seeded_noise(latent_image["samples"], noise_seed) * float(add_noise)
        return sample(model, positive, negative, latent_image, noise, sampler, sigmas, cfg)


class SaveImage:
    """Saves an IMAGE as PNG files in the output folder, with the workflow in them."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prefix = ("STRING", {"default": "ComfyUI", "tooltip": "Start of the file names; may have subfolders."})
        return {"required": {"images": ("IMAGE",), "filename_prefix": prefix}, "hidden": _HIDDEN}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str = "ComfyUI") -> bool | str:
        from ...files import confined

        try:
            confined(current().directory("output"), filename_prefix)
        except ValueError as error:
            return str(error)
        return True

    def save(self, images: Any, filename_prefix: str, prompt: Any, extra_pnginfo: Any) -> dict[str, Any]:
        from .images import save_images

        return {
            "ui": {
                "images": save_images(
                    images, current().folder("output"), filename_prefix, "output", prompt, extra_pnginfo
                )
            }
        }


class PreviewImage:
    """Saves an IMAGE as PNG files in the folder for temporary files."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}, "hidden": _HIDDEN}

    def save(self, images: Any, prompt: Any, extra_pnginfo: Any) -> dict[str, Any]:
        from .images import save_images, temporary_prefix

        saved = save_images(images, current().folder("temp"), temporary_prefix(), "temp", prompt, extra_pnginfo)
        return {"ui": {"images": saved}}


def _sigmas(model: Any, scheduler: str, steps: int, denoise: float) -> Any:
    from .noise_levels import levels_of
    from .schedules import sigmas_for

    return sigmas_for(levels_of(model), scheduler, steps, denoise)


def _pixels(default: int, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": 0, "max": 16384, "tooltip": tooltip}


def _image_names() -> list[str]:
    folder = current().directory("input")
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file.name for file in files if file.suffix.lower() in _IMAGES)


def _image_path(name: str) -> Any:
    """Path of an image by its name, with ComfyUI's ' [output]' and the like at its end."""
    for kind in ("input", "output", "temp"):
        if name.endswith(f"[{kind}]"):
            return current().path(kind, name.removesuffix(f"[{kind}]").strip())
    return current().path("input", name)


NODES = (
    CheckpointLoaderSimple,
    LoraLoader,
    LoraLoaderModelOnly,
    CLIPTextEncode,
    CLIPTextEncodeSDXL,
    ConditioningZeroOut,
    EmptyLatentImage,
    LoadImage,
    EmptyImage,
    VAEEncode,
    VAEDecode,
    KSampler,
    KSamplerSelect,
    BasicScheduler,
    SamplerCustom,
    SaveImage,
    PreviewImage,
)

"""The denoiser that samplers call: prompts, classifier-free guidance, inpainting; one batched network call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..port import HostError
from . import sdxl
from .model import Model, run_unet
from .noise_levels import NoiseLevels

_BLACK = (0.8223, -0.6876, 0.6364, 0.1380)
"""A pixel value of 0 in latents: what inpainting models are given for an image that is not there."""
_UNDERSTOOD = {"pooled_output", "noise_concat", "concat_latent_image", "concat_mask", *sdxl.SIZE_NAMES}


class Denoiser:
    """denoiser(x, sigma) -> x_data_hat, for samplers in k-diffusion's calling convention.

    Args:
        model: its patches are merged for these calls only.
        levels: what sigma means.
        positive, negative: CONDITIONING; entries of a list are averaged.
        cfg: guidance scale; at 1 the negative is not computed.
        noise, image: x_noise and x_data (B, C, h, w), for masks and inpainting models.
        mask: (B, C, h, w), 1 where the image may change, or None.

    Raises:
        HostError: conditioning that headless does not understand, or that the network has no channels for.
    """

    def __init__(
        self,
        model: Model,
        levels: NoiseLevels,
        positive: Any,
        negative: Any,
        cfg: float,
        noise: Tensor,
        image: Tensor,
        mask: Tensor | None,
    ) -> None:
        self.levels, self._cfg = levels, cfg
        self._base, self._sees_image = model.base, model.sees_image
        self._module, self._dtype = model.base.weights.merged(model.patches), model.base.dtype
        self._noise, self._image, self._mask = noise, image, mask
        sides = [positive] if math.isclose(cfg, 1.0) else [positive, negative]
        self._counts = [len(side) for side in sides]
        self._calls = self._conditions([entry for side in sides for entry in side])

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """x_data_hat (B, C, h, w) at state x, sigma (B,); `extra` is k-diffusion's and unused."""
        if self._mask is None:
            return self._guided(x, sigma)
        kept = self.levels.noisy(sigma, self._noise, self._image)
        denoised = self._guided(x * self._mask + kept * (1.0 - self._mask), sigma)
        return denoised * self._mask + self._image * (1.0 - self._mask)

    def _guided(self, x: Tensor, sigma: Tensor) -> Tensor:
        """negative + cfg (positive - negative)."""
        parts = self._denoised(x, sigma)
        positive = torch.stack(parts[: self._counts[0]]).mean(dim=0)
        if len(self._counts) == 1:
            return positive
        negative = torch.stack(parts[self._counts[0] :]).mean(dim=0)
        return negative + (positive - negative) * self._cfg

    def _denoised(self, x: Tensor, sigma: Tensor) -> Sequence[Tensor]:
        """x_data_hat for every condition, all in one network call."""
        conditioning, concat = self._calls
        count = len(conditioning["context"]) // len(x)
        x_diff = self.levels.network_input(sigma, x).repeat(count, 1, 1, 1)
        tau = self.levels.timestep(sigma).float().repeat(count)
        outputs = run_unet(self._module, self._dtype, torch.cat([x_diff, *concat], dim=1), tau, conditioning)
        return [self.levels.denoised(sigma, output, x) for output in outputs.chunk(count)]

    def _conditions(self, entries: Sequence[Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What `run_unet` takes, for entries · B; what is put beside x_diff (entries · B, c, h, w), if anything."""
        for context, options in entries:
            _refuse_unknown(options)
            self._require_width(context)
        conditioning = {"context": self._contexts([context for context, _ in entries])}
        if self._base.layout.family == "SDXL":
            beside = [sdxl.beside(options, self._image, self._base.layout.pooled_width) for _, options in entries]
            for name in ("pooled", "sizes"):
                conditioning[name] = torch.cat([repeated(each[name], len(self._image)) for each in beside])
        more = _first_conv(self._module).weight.shape[1] - self._image.shape[1]
        if more == 0:
            return conditioning, []
        return conditioning, [torch.cat([self._extra_channels(options, more) for _, options in entries])]

    def _contexts(self, given: Sequence[Tensor]) -> Tensor:
        """Contexts (entries · B, tokens, width), repeated to one number of tokens.

        ComfyUI's samplers do the same: attention gives what each context gives at its own length. Training pads
        instead (`training.contexts`), as a batch there holds captions of any number of lengths.
        """
        contexts = [repeated(context.to(self._image), len(self._image)) for context in given]
        tokens = math.lcm(*(context.shape[1] for context in contexts))
        return torch.cat([context.repeat(1, tokens // context.shape[1], 1) for context in contexts])

    def _require_width(self, context: Tensor) -> None:
        layout = self._base.layout
        if context.shape[-1] != layout.context_width:
            raise HostError(
                f"the conditioning is {context.shape[-1]} wide, the {layout.family} model '{self._base.name}' takes"
                f" {layout.context_width}: it comes from another model's CLIP; connect the CLIP of the same checkpoint"
            )

    def _extra_channels(self, options: dict[str, Any], count: int) -> Tensor:
        """Channels beside the latents (B, count, h, w): given by the conditioning, or mask and image for inpainting."""
        given = options.get("noise_concat")
        if given is None and count == self._image.shape[1] + 1:
            given = torch.cat([self._inpaint_mask(options), self._inpaint_image(options)], dim=1)
        if given is None and count == self._image.shape[1]:
            given = self._concat_image(options)
        if given is None or given.shape[1] != count:
            have = 0 if given is None else given.shape[1]
            raise HostError(
                f"the network wants {count} channels beside the latents, the conditioning brings {have}; use the node"
                " that prepares the conditioning for this model"
            )
        return repeated(_resized(given.to(self._image), self._image), len(self._image))

    def _concat_image(self, options: dict[str, Any]) -> Tensor:
        """The image's latent beside the noisy one: as it is for models edited by text, as ComfyUI has it, else scaled.

        Raises:
            HostError: a depth model without an image.
        """
        given = options.get("concat_latent_image")
        if not self._sees_image:
            return torch.zeros_like(self._image) if given is None else given
        if given is None:
            raise HostError(
                "the model looks at an image (a depth LoRA is on it), and the conditioning brings none; use Diff2Flow"
                " Depth, or remove the LoRA"
            )
        return given * self._base.latent_scale

    def _inpaint_mask(self, options: dict[str, Any]) -> Tensor:
        mask = options.get("concat_mask", self._mask)
        if mask is None:
            return torch.ones_like(self._image[:, :1])
        mask = mask[:, :1] if mask.ndim == 4 else mask.reshape(-1, 1, *mask.shape[-2:])
        return repeated(_resized(mask.to(self._image), self._image).round(), len(self._image))

    def _inpaint_image(self, options: dict[str, Any]) -> Tensor:
        if "concat_latent_image" in options:
            image = options["concat_latent_image"].to(self._image) * self._base.latent_scale
            return repeated(_resized(image, self._image), len(self._image))
        if self._mask is not None:
            return self._image
        return torch.tensor(_BLACK).to(self._image).reshape(1, -1, 1, 1).expand_as(self._image)


def repeated(x: Tensor, batch: int) -> Tensor:
    """x with its first dimension repeated, or cut, to `batch`."""
    if len(x) == batch:
        return x
    return x.repeat(math.ceil(batch / len(x)), *[1] * (x.ndim - 1))[:batch]


def _resized(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return nn.functional.interpolate(x, size=like.shape[-2:], mode="bilinear")


def _refuse_unknown(options: dict[str, Any]) -> None:
    unknown = sorted(name for name, value in options.items() if name not in _UNDERSTOOD and value is not None)
    if unknown:
        raise HostError(
            f"the conditioning carries {', '.join(unknown)}, which headless does not understand; take out the node that"
            " adds it, or run the workflow in ComfyUI"
        )


def _first_conv(module: nn.Module) -> nn.Module:
    return module.conv_in  # type: ignore[return-value]

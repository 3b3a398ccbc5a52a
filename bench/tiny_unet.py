"""Slim UNets in the mould of SD1, SD2 and SDXL: 320 channels, any number of levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..alignment import Alignment, NoiseSchedule
from ..samplers import integrate, time_grid

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CONTEXT_WIDTH = {"SD1": 768, "SD2": 1024, "SDXL": 2048}
_POOLED_WIDTH, _SIZE_WIDTH, _SIZES = 1280, 256, 6
_SDXL_DEPTHS = (0, 1, 2)
"""Transformer layers of Segmind Vega's levels: the smallest SDXL that ComfyUI knows (3 levels of 2 blocks)."""
_MULTIPLES = (1, 2, 4, 4)
_RIDGE = 0.1
_BRANCH = 0.3
_TEXT = 3.0
_BRANCHES = ("conv2", "proj_out", "ff.net.2", "attn1.to_out.0")
_OFF_CENTRE = 0.1
_SNR_CAP = 5.0


def unet_config(
    levels: int = 1, blocks: int = 1, family: str = "SD1", in_channels: int = 4, width: int = 320
) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel for a UNet that ComfyUI takes for the family's.

    Args:
        levels: 1 to 4 resolutions; more than one: the last has no attention, as in the real networks. SDXL: 2 or 3,
            and the first has none; ComfyUI knows 3 levels of 2 blocks.
        blocks: resnets a level.
        family: "SD1", "SD2" or "SDXL".
        in_channels: 4, or 9 for inpainting.
        width: channels of the first level; ComfyUI wants 320.

    Raises:
        ValueError: another family, or levels out of range.
    """
    if family not in CONTEXT_WIDTH:
        raise ValueError(f"family {family!r} is none of {', '.join(CONTEXT_WIDTH)}")
    if family == "SDXL":
        return _sdxl_config(levels, blocks, in_channels, width)
    if not 1 <= levels <= len(_MULTIPLES):
        raise ValueError(f"levels must be 1 to {len(_MULTIPLES)}, not {levels}")
    attended = [level < levels - 1 or levels == 1 for level in range(levels)]
    channels = tuple(width * multiple for multiple in _MULTIPLES[:levels])
    return {
        "in_channels": in_channels,
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
        "attention_head_dim": 8 if family == "SD1" else tuple(count // 64 for count in channels),
        "cross_attention_dim": CONTEXT_WIDTH[family],
        "use_linear_projection": family == "SD2",
    }


def _sdxl_config(levels: int, blocks: int, in_channels: int, width: int) -> dict[str, Any]:
    if not 2 <= levels <= len(_SDXL_DEPTHS):
        raise ValueError(f"SDXL's levels must be 2 to {len(_SDXL_DEPTHS)}, not {levels}")
    depths = _SDXL_DEPTHS[:levels]
    channels = tuple(width * multiple for multiple in _MULTIPLES[:levels])
    return {
        "in_channels": in_channels,
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in depths),
        "attention_head_dim": tuple(max(1, count // 64) for count in channels),
        "cross_attention_dim": CONTEXT_WIDTH["SDXL"],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _SIZE_WIDTH,
        "projection_class_embeddings_input_dim": _POOLED_WIDTH + _SIZES * _SIZE_WIDTH,
    }


def random_unet(config: dict[str, Any], seed: int, device: str = "cpu") -> UNet2DConditionModel:
    """A diffusers UNet with its library's initialisation, seeded; each kind of device draws its own numbers."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[] if device == "cpu" else None), torch.device(device):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**config)


def trainable_unet(width: int, seed: int) -> UNet2DConditionModel:
    """A one-level SD1 UNet to be trained; its text is loud from the start, so that it soon heeds captions."""
    unet = random_unet(unet_config(width=width), seed)
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith(("attn2.to_v", "attn2.to_out.0")):
                module.weight *= _TEXT
    return unet


def denoising_loss(unet: UNet2DConditionModel, x_data: Tensor, context: Tensor, random: torch.Generator) -> Tensor:
    """Mean squared error of eps at random tau, weighted min(SNR, 5)/SNR (Hang et al. 2023).

    Args:
        x_data: (B, 4, h, w), mean 0 and std 1.
        context: (B, 77, width).
        random: on the CPU.
    """
    tau = torch.randint(0, 1000, (len(x_data),), generator=random)
    signal = _signal()[tau].to(x_data).reshape(-1, 1, 1, 1)
    eps = torch.randn(x_data.shape, generator=random).to(x_data)
    x_diff = signal.sqrt() * x_data + (1 - signal).sqrt() * eps
    output = unet(x_diff, tau.to(x_data.device), context, return_dict=False)[0]
    ratio = signal / (1 - signal)
    return ((output - eps).square() * ratio.clamp(max=_SNR_CAP) / ratio).mean()


@torch.no_grad()
def samples(
    unet: UNet2DConditionModel, context: Tensor, empty: Tensor, steps: int, cfg: float, seed: int, batch: int = 64
) -> Tensor:
    """x_data (B, 4, 8, 8) drawn by Euler steps along the aligned flow, from the schedule's terminal.

    Args:
        context: (B, 77, width); one for each sample.
        empty: (1, 77, width), of the empty caption.
    """
    noise = torch.randn(len(context), 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(context)
    parts = zip(noise.split(batch), context.split(batch), strict=True)
    return torch.cat([_sampled(unet, x_noise, part, empty, steps, cfg) for x_noise, part in parts])


def _sampled(
    unet: UNet2DConditionModel, x_noise: Tensor, context: Tensor, empty: Tensor, steps: int, cfg: float
) -> Tensor:
    alignment = Alignment(NoiseSchedule.scaled_linear(), "eps")
    both = torch.cat([context, empty.expand_as(context)])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        x_diff, tau = alignment.to_diffusion(x, t).to(x_noise), alignment.timestep(t)
        with_text, without = unet(x_diff.repeat(2, 1, 1, 1), tau, both, return_dict=False)[0].chunk(2)
        return alignment.velocity(without + cfg * (with_text - without), x, t)

    t_min = alignment.t_range[0]
    x = x_noise * (t_min**2 + (1 - t_min) ** 2) ** 0.5
    return integrate(velocity, x, time_grid(steps, start=t_min))


@torch.no_grad()
def fit_last_layer(unet: UNet2DConditionModel, prediction: str, seed: int, samples: int = 64) -> None:
    """Makes a random network denoise a little, so that its samples stay bounded.

    Quiet residual branches, loud text, and a last convolution that is fitted by ridge regression.

    Args:
        prediction: "eps" or "v".
        samples: images of smooth noise that it is fitted on.
    """
    random, device = torch.Generator().manual_seed(seed), unet.conv_out.weight.device
    inputs, target, weight = _task(unet.config, prediction, samples, random)
    for name, module in unet.named_modules():
        if name.endswith((*_BRANCHES, "attn2.to_out.0")):
            module.weight *= _TEXT if "attn2" in name else _BRANCH
            module.bias *= _BRANCH
    off_centre = torch.ones(3, 3).index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(0.0)).bool()
    unet.conv_in.weight[..., off_centre] *= _OFF_CENTRE
    features: list[Tensor] = []
    hook = unet.conv_out.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
    try:
        beside = _beside(unet.config, samples, random) or {}
        unet(*(x.to(device) for x in inputs), added_cond_kwargs={name: x.to(device) for name, x in beside.items()})
    finally:
        hook.remove()
    x = features[0].movedim(1, -1).flatten(0, -2).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype, device=device)], dim=1)
    y = target.movedim(1, -1).flatten(0, -2).double().to(device)
    weighted = x * weight.double().repeat_interleave(target[0, 0].numel())[:, None].to(device)
    gram = weighted.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=device)
    solution = torch.linalg.solve(gram, weighted.T @ y).float()
    unet.conv_out.weight.copy_(torch.empty(unet.conv_out.weight.shape).normal_(0.0, 1e-3, generator=random))
    unet.conv_out.weight[:, :, 1, 1] += solution[:-1].T
    unet.conv_out.bias[:] = solution[-1]


def _task(
    config: Any, prediction: str, samples: int, random: torch.Generator
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """(x_diff, tau, context), what the network should predict there, and how much each sample counts.

    An error in eps moves a sample by sigma/alpha times as much, so the noisy ones count more.
    """
    coarse = torch.randn(samples, 4, 3, 3, generator=random)
    x_data = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bicubic", align_corners=True)
    eps = torch.randn(x_data.shape, generator=random)
    tau = torch.randint(0, 1000, (samples,), generator=random)
    signal = _signal()[tau].reshape(-1, 1, 1, 1)
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    x_diff = alpha * x_data + sigma * eps
    beside = torch.randn(samples, config.in_channels - 4, 8, 8, generator=random)
    context = torch.randn(samples, 77, config.cross_attention_dim, generator=random)
    target = eps if prediction == "eps" else alpha * eps - sigma * x_data
    weight = 1.0 + (sigma / alpha).flatten()
    return (torch.cat([x_diff, beside], dim=1), tau, context), target, weight


def _beside(config: Any, samples: int, random: torch.Generator) -> dict[str, Tensor] | None:
    """SDXL's pooled text and sizes, of random text and of small uncropped images."""
    if config.addition_embed_type is None:
        return None
    sizes = torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0]).expand(samples, -1)
    return {"text_embeds": torch.randn(samples, _POOLED_WIDTH, generator=random), "time_ids": sizes}


def _signal() -> Tensor:
    """alpha² of SD's schedule, (1000,) float32."""
    return torch.as_tensor(NoiseSchedule.scaled_linear().alphas_cumprod).float()

"""Single-file checkpoints: reads SD1.x, SD2.x and SDXL files and builds their networks, by diffusers' classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...alignment import NoiseSchedule
from ...training.checkpoint_file import Marks, contents_if_readable, marks
from ..choice import tell_lost_prediction
from ..port import HostError
from .autoencoder import Autoencoder, read_autoencoder
from .model import Base, Model
from .text import TextEncoder, context_width, read_text_encoder
from .unet_layout import PREFIX, RUNS, UnetLayout, family_of_keys
from .weights import Weights

_HALF = (torch.float16, torch.bfloat16)
_V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.09
"""SD2 networks of v prediction have this bias spread wider: what ComfyUI tells them by."""
_OTHER_NOISE = (
    ("edm_mean", "Playground v2.5 (EDM)"),
    ("edm_vpred.sigma_max", "an SDXL checkpoint of EDM's v prediction"),
)
"""Keys of SDXL networks that were trained with other noise than Stable Diffusion's."""


def load_checkpoint(
    path: Path, name: str, device: torch.device
) -> tuple[Model, TextEncoder | None, Autoencoder | None]:
    """MODEL, CLIP, VAE of a checkpoint; CLIP or VAE is None where the file has none.

    Weights are float32 on the CPU; elsewhere the UNet keeps the file's half precision (the latter is unmeasured).

    Raises:
        HostError: the file cannot be read, or holds no checkpoint of these families; names the file and what it is.
    """
    state = read_weights(path, name)
    unet = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    if "input_blocks.0.0.weight" not in unet:
        raise HostError(f"'{name}' is {family_of_keys(state)}: headless runs {RUNS} in a single file")
    layout = UnetLayout(unet, name)
    _refuse_other_noise(state, name)
    marked = _marks(path, state)
    prediction = _prediction(unet, marked, layout)
    if marked.lost_v and prediction == "eps":
        tell_lost_prediction(name)
    module = _build_unet(unet, layout, name, device)
    base = Base(
        weights=Weights(module),
        layout=layout,
        prediction=prediction,
        schedule=_schedule(prediction, marked),
        path=path,
        name=name,
        device=device,
        dtype=module.conv_in.weight.dtype,
    )
    clip = read_text_encoder(state, layout.family, name, device)
    if clip is not None and context_width(clip) != layout.context_width:
        raise HostError(
            f"'{name}' has text encoders of width {context_width(clip)} and a UNet that takes {layout.context_width}:"
            f" a mixed file, or none of {layout.family}; choose another checkpoint"
        )
    vae = read_autoencoder(state, name, device)
    if vae is not None:
        vae.path = path
    return Model(base), None if clip is None else replace(clip, path=path), vae


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .ckpt/.pt that holds nothing but tensors; nothing is unpickled.

    Raises:
        HostError: the file is truncated, of another format, or wants to run code.
    """
    reader = _read_safetensors if path.suffix.lower() in (".safetensors", ".sft") else _read_torch
    try:
        return reader(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise HostError(
            f"the file '{name}' ({path.stat().st_size} bytes) cannot be read: it is truncated or of another format"
            f" ({reason}); copy it again, or convert it to .safetensors"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path, device="cpu")


def _read_torch(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _build_unet(unet: Mapping[str, Tensor], layout: UnetLayout, name: str, device: torch.device) -> nn.Module:
    """The UNet on its device, in float32 on the CPU, elsewhere in the file's half precision if it has that."""
    kept = unet["input_blocks.0.0.weight"].dtype if device.type != "cpu" else torch.float32
    return build_unet(unet, layout, name, kept if kept in _HALF else torch.float32).to(device)


def build_unet(unet: Mapping[str, Tensor], layout: UnetLayout, name: str, dtype: torch.dtype) -> nn.Module:
    """diffusers' UNet with a checkpoint's weights, by their names without prefix; see `fill`."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        module = UNet2DConditionModel(**layout.config)
    renamed = {layout.to_diffusers(key): value for key, value in unet.items()}
    return fill(module, renamed, name, "UNet", dtype)


def fill(
    module: nn.Module, state: Mapping[str, Tensor], name: str, what: str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The meta-device module with the file's weights in it, in `dtype`, frozen and in evaluation mode.

    Raises:
        HostError: weights are missing, or have another shape than their neighbours imply.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    if missing:
        raise HostError(
            f"'{name}' lacks {len(missing)} weights of its {what} (e.g. '{missing[0]}'): the file is incomplete;"
            " copy it again"
        )
    wrong = [key for key in wanted if state[key].shape != wanted[key].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)}, not {tuple(wanted[wrong[0]].shape)}"
        raise HostError(
            f"'{name}': the {what}'s weight '{wrong[0]}' is {shapes}; the file is damaged or of a variant that"
            " headless does not run"
        )
    module.load_state_dict({key: state[key].to(dtype) for key in wanted}, assign=True)
    return module.requires_grad_(False).eval()


def _refuse_other_noise(state: Mapping[str, Tensor], name: str) -> None:
    for key, what in _OTHER_NOISE:
        if key in state:
            raise HostError(
                f"'{name}' is {what}: it was not trained on Stable Diffusion's noise schedule and cannot be converted;"
                " choose an SDXL checkpoint of eps or v prediction"
            )


def _marks(path: Path, state: Mapping[str, Tensor]) -> Marks:
    contents = contents_if_readable(path)
    return marks(state.keys(), contents.metadata if contents else {})


def _prediction(unet: Mapping[str, Tensor], marked: Marks, layout: UnetLayout) -> str:
    """ "v" for a file that is marked so and for SD2 networks whose biases say so, else "eps"."""
    if marked.v:
        return "v"
    bias = unet.get(_V_BIAS)
    if layout.family == "SD2" and layout.config["in_channels"] == 4 and bias is not None:
        return "v" if float(bias.float().std(unbiased=False)) > _V_SPREAD else "eps"
    return "eps"


def _schedule(prediction: str, marked: Marks) -> NoiseSchedule:
    """Zero terminal SNR where a v model is marked so; as in ComfyUI, the mark says nothing of an eps model."""
    schedule = NoiseSchedule.scaled_linear()
    return schedule.zero_terminal_snr() if prediction == "v" and marked.zero_terminal_snr else schedule

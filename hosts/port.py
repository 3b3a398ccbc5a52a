"""What the nodes ask of a host. ComfyUI (`hosts/comfy`) and the headless runner (`hosts/headless`) both answer it.

Sockets carry the same data in both hosts: IMAGE (B, H, W, 3) float in [0, 1]; LATENT {"samples": (B, C, h, w)} in the
autoencoder's own scale; CONDITIONING [[context (B, tokens, width), {"pooled_output": ...}], ...]; SIGMAS (steps + 1,).
MODEL, CLIP, VAE and SAMPLER are the host's own objects and opaque to the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the headless command line reports a wrong workflow before it imports torch
    from torch import Tensor

    from ..alignment import NoiseSchedule
    from ..samplers.parameterization import FlowParameterization
    from ..training.checkpoint_file import StoredTensor
    from ..training.identity import Identity
    from ..training.port import Backbone, Progress
    from .choice import FlowChoice

Said = Mapping[str, str]
"""Metadata of a file: what it says of itself."""

FOLDERS = ("checkpoints", "loras", "datasets", "metrics", "input", "output", "temp")


class HostError(ValueError):
    """Something the user can mend, in one sentence that names the input, the value and the way out."""


@dataclass(frozen=True)
class ModelFacts:
    """What a MODEL is.

    Args:
        family: "SD1", "SD2" or "SDXL".
        prediction: "eps", "v" or "x0", as the host samples the model now.
        schedule: the noise schedule that the host samples it with.
        in_channels: of the network's first convolution (4; 9 for inpainting; 8 with a depth LoRA).
        flow: set when `as_flow` has been applied.
        loras: metadata of the Diff2Flow LoRAs applied, in the order they were applied.
        sees_image: whether a LoRA has widened the first convolution, so that the network looks at an image (depth).
            Its latent is the option "concat_latent_image" of the conditioning, in the autoencoder's own scale.
        base_name: of the checkpoint's file in the folder "checkpoints"; "" where that is unknown.
    """

    family: str
    prediction: str
    schedule: NoiseSchedule
    in_channels: int
    flow: FlowParameterization | None = None
    loras: tuple[Said, ...] = field(default=())
    sees_image: bool = False
    base_name: str = ""


class Host(Protocol):
    """One host. Every method raises HostError (a ValueError) for what the user can mend."""

    name: str

    # files
    def names(self, kind: str) -> list[str]:
        """Names in a folder of FOLDERS ("checkpoints", "loras", or subfolders of "input"/"datasets"), sorted."""

    def path(self, kind: str, name: str) -> Path:
        """Path of an existing file or folder by its name; HostError if there is none or it leads out."""

    def folder(self, kind: str) -> Path:
        """The folder of that kind that may be written to; made if it is missing."""

    def inversions_state(self) -> str:
        """A string that changes when a file of a textual inversion is added, removed or changed."""

    # loading
    def load_checkpoint(self, name: str) -> tuple[Any, Any, Any]:
        """MODEL, CLIP, VAE of a single-file checkpoint."""

    def apply_lora(
        self, model: Any, clip: Any, state: Mapping[str, Tensor], strength: float, metadata: Mapping[str, str] | None
    ) -> tuple[Any, Any]:
        """Clones of model and clip (None allowed) with the LoRA added; metadata joins ModelFacts.loras when given.

        HostError if no key fits the model (a LoRA for another base), naming both. The originals stay as they are.
        """

    # sampling
    def facts(self, model: Any) -> ModelFacts:
        """What the model is; HostError naming the family where it is none of SD1, SD2 and SDXL."""

    def as_flow(self, model: Any, flow: FlowParameterization) -> Any:
        """A clone that is sampled as a flow model in sigma_flow."""

    def along(self, model: Any, flow: FlowParameterization, times: Tensor) -> tuple[Any, Tensor]:
        """A clone that `solver` samples along the flow, and flow times (steps + 1,) as its SIGMAS.

        In sigma_k where other nodes' patches need it and it holds the walk, else as `as_flow` has it.
        """

    def speaks_flow(self, denoiser: Any) -> bool:
        """Whether a denoiser, as SAMPLER functions get it, counts in sigma_flow; else in sigma_k."""

    def as_chosen_flow(self, model: Any, choice: FlowChoice) -> Any:
        """A clone that is sampled as a flow model in sigma_flow; which flow that is, is found when sampling begins.

        The LoRAs that are then on the model count, whether they came before or after. Raises what `FlowChoice.flow`
        raises of the LoRAs that are there already.
        """

    def sampler(self, function: Callable[..., Tensor], options: Mapping[str, Any]) -> Any:
        """SAMPLER of a k-diffusion style function (denoiser, x, sigmas, extra_args, callback, disable, **options)."""

    def solver(self, solver: str, rtol: float, atol: float) -> Any:
        """SAMPLER that solves the flow with `samplers.integrate`, right for stock models and for `as_flow` models."""

    def sample(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent: Mapping[str, Any],
        seed: int,
        sampler: Any,
        sigmas: Tensor,
        cfg: float,
    ) -> dict[str, Any]:
        """LATENT sampled from seeded noise (CPU generator, as ComfyUI draws it) around latent["samples"].

        Items of equal number in latent["batch_index"], where that is given, have the same noise.
        """

    # encoders
    def encode_text(self, clip: Any, text: str) -> Any:
        """CONDITIONING of a prompt."""

    def inversions(self, clip: Any, names: Sequence[str]) -> dict[str, str]:
        """Names of textual inversions -> digests of the files of those that "embedding:name" finds for this CLIP."""

    def encode_image(self, vae: Any, image: Tensor) -> Tensor:
        """Latents (B, C, H/8, W/8) of an IMAGE (B, H, W, 3), in the autoencoder's own scale."""

    def decode_image(self, vae: Any, latent: Tensor) -> Tensor:
        """IMAGE (B, H, W, 3) of latents (B, C, h, w) in the autoencoder's own scale."""

    def fingerprint(self, thing: Any) -> Identity:
        """What tells two CLIPs, VAEs or MODELs apart that do not compute the same; cheap (samples the weights)."""

    # saving
    def checkpoint(self, model: Any, clip: Any, vae: Any) -> Mapping[str, StoredTensor]:
        """A single-file checkpoint in Stable Diffusion's original layout, LoRAs merged into the weights.

        Only weights: no markers (v_pred, ztsnr). HostError where model, clip or vae cannot be written so.
        """

    def patched(self, thing: Any) -> bool:
        """Whether a LoRA is applied to a MODEL or CLIP."""

    def clip_merges(self) -> Sequence[tuple[str, str]]:
        """The merge rules of CLIP's tokenizer, which its vocabulary follows from."""

    # training
    def training(self, model: Any, clip: Any = None) -> AbstractContextManager[Backbone]:
        """The network ready for gradients; whatever was changed on it is undone when the context ends."""

    def sampling_patches(self, model: Any) -> tuple[str, ...]:
        """Names of what nodes have put on a MODEL that acts in sampling only (FreeU, guidance, IP-Adapter).

        Training and the making of pairs call the bare network with its LoRAs.
        """

    def progress(self, total: int, title: str) -> Progress:
        """A progress bar of the running node."""

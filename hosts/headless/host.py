"""The port (`hosts.port.Host`) answered without ComfyUI. torch and diffusers are imported when first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..port import HostError
from .folders import Folders

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...samplers.parameterization import FlowParameterization
    from ...training.checkpoint_file import StoredTensor
    from ...training.identity import Identity
    from ...training.port import Backbone, Progress
    from ..choice import FlowChoice
    from ..port import ModelFacts


class HeadlessHost:
    """Runs on diffusers and transformers, with ComfyUI's folder layout.

    Args:
        models: holds checkpoints, loras and datasets.
        input: images to read.
        output: images to write; previews go to its subfolder temp.
        device: torch's name of a device, "cpu" or "cuda"; of several processes each takes its own "cuda".
    """

    name = "headless"

    def __init__(self, models: Path, input: Path, output: Path, device: str = "cpu") -> None:
        self._folders = Folders(Path(models), Path(input), Path(output))
        self._device_name = device

    @cached_property
    def device(self) -> torch.device:
        """The device; HostError if there is none of that name."""
        import torch

        from ...training.launch import local_device

        try:
            device = torch.device(local_device(self._device_name))
            torch.empty(0, device=device)
            return device
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:160]
            raise HostError(f"the device {self._device_name!r} cannot be used ({reason}); give --device cpu") from error

    def names(self, kind: str) -> list[str]:
        return self._folders.names(kind)

    def path(self, kind: str, name: str) -> Path:
        return self._folders.path(kind, name)

    def folder(self, kind: str) -> Path:
        return self._folders.folder(kind)

    def directory(self, kind: str) -> Path:
        """The folder of a kind, whether it exists or not."""
        return self._folders.directory(kind)

    def inversions_state(self) -> str:
        """None are loaded."""
        return ""

    def load_checkpoint(self, name: str) -> tuple[Any, Any, Any]:
        from ...training.checkpoint_file import trained_metadata
        from .checkpoint import load_checkpoint

        path = self.path("checkpoints", name)
        model, clip, vae = load_checkpoint(path, name, self.device)
        trained = trained_metadata(path)
        return (model.with_patches((), trained) if trained else model), clip, vae

    def apply_lora(
        self, model: Any, clip: Any, state: Mapping[str, Tensor], strength: float, metadata: Mapping[str, str] | None
    ) -> tuple[Any, Any]:
        from .lora import apply_lora

        return apply_lora(model, clip, state, (strength, strength), metadata)

    def facts(self, model: Any) -> ModelFacts:
        return model.facts

    def as_flow(self, model: Any, flow: FlowParameterization) -> Any:
        return model.as_flow(flow)

    def along(self, model: Any, flow: FlowParameterization, times: Tensor) -> tuple[Any, Tensor]:
        from ...samplers.parameterization import sigma_flow_of

        return model.as_flow(flow), sigma_flow_of(times)

    def speaks_flow(self, denoiser: Any) -> bool:
        return denoiser.levels.flow

    def as_chosen_flow(self, model: Any, choice: FlowChoice) -> Any:
        return model.as_chosen_flow(choice)

    def sampler(self, function: Callable[..., Tensor], options: Mapping[str, Any]) -> Any:
        from .sampling import Sampler

        return Sampler(function, dict(options))

    def solver(self, solver: str, rtol: float, atol: float) -> Any:
        from . import sampling

        return sampling.solver(solver, rtol, atol)

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
        from .sampling import sample, seeded_noise

        noise = seeded_noise(latent["samples"], seed, latent.get("batch_index"))
        return sample(model, positive, negative, latent, noise, sampler, sigmas, cfg)[0]

    def encode_text(self, clip: Any, text: str) -> Any:
        return _present(clip, "text encoder").encode(text)

    def encode_texts(self, clip: Any, texts: Mapping[str, str]) -> Any:
        """CONDITIONING of one prompt for each text encoder: SDXL's "l" and "g"."""
        return _present(clip, "text encoder").encode(texts)

    def inversions(self, clip: Any, names: Sequence[str]) -> dict[str, str]:
        """None: `prompts.refuse_embeddings` refuses them."""
        return {}

    def encode_image(self, vae: Any, image: Tensor) -> Tensor:
        return _present(vae, "autoencoder").encode(image)

    def decode_image(self, vae: Any, latent: Tensor) -> Tensor:
        """IMAGE (B, H, W, 3) of latents in the autoencoder's own scale."""
        return _present(vae, "autoencoder").decode(latent)

    def fingerprint(self, thing: Any) -> Identity:
        from .identity import fingerprint

        return fingerprint(thing)

    def checkpoint(self, model: Any, clip: Any, vae: Any) -> Mapping[str, StoredTensor]:
        from .saving import checkpoint_tensors

        return checkpoint_tensors(model, _present(clip, "text encoder"), _present(vae, "autoencoder"))

    def patched(self, thing: Any) -> bool:
        return any(patch.strength for patch in thing.patches)

    def clip_merges(self) -> Sequence[tuple[str, str]]:
        from .tokens import merges

        return merges()

    def training(self, model: Any, clip: Any = None) -> AbstractContextManager[Backbone]:
        from .backbone import training

        return training(model, clip)

    def sampling_patches(self, model: Any) -> tuple[str, ...]:
        return ()

    def progress(self, total: int, title: str) -> Progress:
        from .progress import TqdmProgress

        return TqdmProgress(total, title)


def _present(thing: Any, what: str) -> Any:
    if thing is None:
        raise HostError(f"the checkpoint has no {what}; choose a full checkpoint")
    return thing

"""The port (`hosts.port.Host`) answered by ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from ...samplers.parameterization import FlowParameterization
from ...training.checkpoint_file import StoredTensor
from ...training.identity import Identity
from ...training.port import Backbone, Progress
from ..choice import FlowChoice
from ..port import ModelFacts
from . import chosen_flow, encoders, folders, identity, loading, models, patches, progress, sampling, saving, training


class ComfyHost:
    """ComfyUI, 0.3.64 and newer."""

    name = "ComfyUI"

    def names(self, kind: str) -> list[str]:
        return folders.names(kind)

    def path(self, kind: str, name: str) -> Path:
        return folders.path(kind, name)

    def folder(self, kind: str) -> Path:
        return folders.folder(kind)

    def inversions_state(self) -> str:
        return folders.state_of("embeddings")

    def load_checkpoint(self, name: str) -> tuple[Any, Any, Any]:
        return loading.load_checkpoint(name)

    def apply_lora(
        self, model: Any, clip: Any, state: Mapping[str, Tensor], strength: float, metadata: Mapping[str, str] | None
    ) -> tuple[Any, Any]:
        return loading.apply_lora(model, clip, state, strength, metadata)

    def facts(self, model: Any) -> ModelFacts:
        return models.facts(model)

    def as_flow(self, model: Any, flow: FlowParameterization) -> Any:
        return sampling.as_flow(model, flow)

    def along(self, model: Any, flow: FlowParameterization, times: Tensor) -> tuple[Any, Tensor]:
        return sampling.along(model, flow, times)

    def speaks_flow(self, denoiser: Any) -> bool:
        return sampling.speaks_flow(denoiser)

    def as_chosen_flow(self, model: Any, choice: FlowChoice) -> Any:
        return chosen_flow.as_chosen_flow(model, choice)

    def sampler(self, function: Callable[..., Tensor], options: Mapping[str, Any]) -> Any:
        return sampling.sampler(function, options)

    def solver(self, solver: str, rtol: float, atol: float) -> Any:
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
        return sampling.sample(model, positive, negative, latent, seed, sampler, sigmas, cfg)

    def encode_text(self, clip: Any, text: str) -> Any:
        return encoders.encode_text(clip, text)

    def inversions(self, clip: Any, names: Sequence[str]) -> dict[str, str]:
        return encoders.inversions(clip, names)

    def encode_image(self, vae: Any, image: Tensor) -> Tensor:
        return encoders.encode_image(vae, image)

    def decode_image(self, vae: Any, latent: Tensor) -> Tensor:
        return encoders.decode_image(vae, latent)

    def fingerprint(self, thing: Any) -> Identity:
        return identity.fingerprint(thing)

    def checkpoint(self, model: Any, clip: Any, vae: Any) -> Mapping[str, StoredTensor]:
        return saving.checkpoint_tensors(model, clip, vae)

    def patched(self, thing: Any) -> bool:
        return saving.patched(thing)

    def clip_merges(self) -> Sequence[tuple[str, str]]:
        return saving.clip_merges()

    def training(self, model: Any, clip: Any = None) -> AbstractContextManager[Backbone]:
        return training.training(model, clip)

    def sampling_patches(self, model: Any) -> tuple[str, ...]:
        return patches.sampling_patches(model)

    def progress(self, total: int, title: str) -> Progress:
        return progress.ComfyProgress(total, title)

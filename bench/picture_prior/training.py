"""Trains the network: in minutes on a card, to which what is learned from travels as one file, or slowly on a CPU."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...alignment import NoiseSchedule
from ...files import written_whole
from . import autoencoder, captions, data, latents, stored, words
from .network import Network, millions
from .stored import Prior

log = logging.getLogger(__name__)
_KEY = "diff2flow.picture_prior.learned"
_WORDINGS = 16
"""Captions that are drawn of each picture before it travels."""
_EMPTY = 0.1
"""Share of pictures that are learned without a caption."""
_SNR_CAP = 5.0
_WARM_UPS, _CHECKED_EVERY, _LOGGED = 3, 50, 10
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Args:
        seconds: by the clock, from the first step on.
        batch: pictures a step.
        rate: highest learning rate of AdamW; it rises over `warm_up` steps and falls to 0 over the last `falling`
            of the time.
        average: decay of the averaged weights, reached gradually.
        clip: greatest norm of the gradient.
        seed: of everything random.
    """

    seconds: float
    batch: int = 512
    rate: float = 2e-3
    warm_up: int = 300
    falling: float = 0.3
    average: float = 0.9995
    clip: float = 1.0
    seed: int = 0

    def rate_at(self, step: int, elapsed: float) -> float:
        """Learning rate of a step (0 being the first) after so many seconds."""
        rise = min(1.0, (step + 1) / self.warm_up)
        return self.rate * rise * min(1.0, max(0.0, 1.0 - elapsed / self.seconds) / self.falling)


@dataclass(frozen=True)
class Learned:
    """What is learned from.

    Args:
        x_data: (variants, N, 4, 16, 16).
        ids: token ids (N, wordings, 24).
        empty: those of the empty caption, (1, 24).
        tokens: ids that have a row.
        mean, std: of the latents, see Latents.
        about: "packages", versions of what the pictures come from, and the "commit" that packed them.
    """

    x_data: Tensor
    ids: Tensor
    empty: Tensor
    tokens: Tensor
    mean: float
    std: float
    about: Mapping[str, Any]


def pack(work: Path, path: Path) -> None:
    """Writes what is learned from into one file: latents in 8 bits, and captions as token ids.

    Args:
        work: folder of the pictures and their latents, all variants that are there.
    """
    from safetensors.torch import save_file

    pictures = data.load(work).chosen(lambda picture: not picture.held_out)
    z = latents.encode(pictures, work, variants=1)
    scale = float(z.z.abs().max()) / 127.0
    drawing, random = captions.Captions(pictures.about), torch.Generator().manual_seed(0)
    texts = [drawing.drawn(place, random) for place in range(len(pictures.about)) for _ in range(_WORDINGS)]
    ids = captions.padded(texts, words.LENGTH).unflatten(0, (len(pictures.about), _WORDINGS))
    tensors = {"z": (z.z.float() / scale).round().to(torch.int8), "ids": ids.to(torch.uint16)}
    tensors["empty"] = captions.padded([""], words.LENGTH).int()
    tensors["tokens"] = torch.tensor(drawing.tokens()).int()
    about = {"scale": scale, "mean": z.mean, "std": z.std}
    about |= {"packages": data.versions(), "commit": _commit()}
    with written_whole(path) as temporary:
        save_file(tensors, str(temporary), metadata={_KEY: json.dumps(about)})


def unpacked(path: Path) -> Learned:
    """Reads what `pack` wrote."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        about = json.loads((file.metadata() or {})[_KEY])
        z = file.get_tensor("z").float() * about.pop("scale")
        mean, std = about.pop("mean"), about.pop("std")
        ids, empty, tokens = (file.get_tensor(name).long() for name in ("ids", "empty", "tokens"))
    return Learned((z - mean) / std, ids, empty, tokens, mean, std, about)


def train(path: Path, work: Path, plan: Plan, command: str, device: torch.device, further: bool = False) -> None:
    """Trains and writes the work folder's prior.safetensors.

    Args:
        path: that `pack` wrote.
        work: folder; the autoencoder is its own, or else the repository's.
        command: for the provenance.
        device: that computes.
        further: goes on from the newest stored weights instead of from nothing.
    """
    learned = unpacked(path)
    before = stored.read(stored.newest(work)) if further else None
    running = Training(learned, plan, device, before and before.network)
    log.info("%.2f million parameters, %d pictures", millions(running.network), learned.x_data.shape[1])
    seconds = running.run()
    earlier = {} if before is None else dict(before.provenance)
    about = {
        "step": running.step,
        "pictures": running.step * plan.batch,
        "seconds": round(seconds),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "command": command,
        **learned.about,
        "plan": asdict(plan),
        "after": earlier,
    }
    own = autoencoder.path(work).is_file()
    module = autoencoder.read(work) if own else stored.read(stored.newest(work)).autoencoder
    work.mkdir(parents=True, exist_ok=True)
    stored.write(stored.path_in(work), Prior(running.averaged(), module, learned.mean, learned.std, about))


class Training:
    """One training, from seeded weights or given ones.

    Args:
        learned: what from.
        plan: how.
        device: where.
        network: to begin with; None: of seeded weights.

    Attributes:
        network: that is trained.
        step: done so far.
    """

    def __init__(self, learned: Learned, plan: Plan, device: torch.device, network: Network | None = None) -> None:
        self.network = (network or Network(learned.tokens.tolist(), plan.seed)).to(device).requires_grad_(True)
        self.step, self._plan, self._device = 0, plan, device
        self._x_data = learned.x_data.to(device)
        self._places = self.network.words.places(learned.ids).to(device)
        self._empty = self.network.words.places(learned.empty).to(device)
        self._parameters: list[nn.Parameter] = list(self.network.parameters())
        self._averages = [parameter.detach().clone() for parameter in self._parameters]
        self._optimizer = torch.optim.AdamW(self._parameters, betas=_BETAS, fused=True)
        self._random = torch.Generator(device).manual_seed(plan.seed)
        self._loss = torch.zeros((), device=device)
        self._alphas, self._weights = (each.to(device) for each in levels())
        self._given = self._drawn()
        self._forward_and_back: Callable[[], Any] = self._eagerly

    def run(self) -> float:
        """Trains for the plan's time; returns the seconds.

        Raises:
            ValueError: the loss is not finite.
        """
        if self._device.type == "cuda":
            self._forward_and_back = self._graph()
        began, elapsed, total = time.monotonic(), 0.0, torch.zeros((), device=self._device)
        while elapsed < self._plan.seconds:
            self.one(elapsed)
            total += self._loss
            if self.step % _CHECKED_EVERY == 0:
                self._check(float(total) / _CHECKED_EVERY, began)
                total.zero_()
            elapsed = time.monotonic() - began
        return elapsed

    def one(self, elapsed: float = 0.0) -> Tensor:
        """A step; returns its loss (), which the next one overwrites.

        Args:
            elapsed: seconds since the first one.
        """
        for static, drawn in zip(self._given, self._drawn(), strict=True):
            static.copy_(drawn)
        self._forward_and_back()
        self._update(elapsed)
        return self._loss

    def averaged(self) -> Network:
        """The network with the averaged weights, on the CPU."""
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._averages, strict=True):
                parameter.copy_(average)
        return self.network.requires_grad_(False).cpu()

    def _check(self, loss: float, began: float) -> None:
        if loss != loss or loss == float("inf"):
            raise ValueError(f"the loss before step {self.step} is {loss}")
        if self.step % (_LOGGED * _CHECKED_EVERY) == 0:
            rate = self.step * self._plan.batch / (time.monotonic() - began)
            log.info("step %d, loss %.5f, %.0f pictures/s", self.step, loss, rate)

    def _drawn(self) -> list[Tensor]:
        """x_diff (B, 4, 16, 16), eps, tau (B,) and the rows' places (B, 24) of a batch."""
        batch, on = self._plan.batch, {"generator": self._random, "device": self._device}
        variants, count = self._x_data.shape[:2]
        place = torch.randint(count, (batch,), **on)
        x_data = self._x_data[torch.randint(variants, (batch,), **on), place]
        rows = self._places[place, torch.randint(self._places.shape[1], (batch,), **on)]
        rows = torch.where(torch.rand(batch, 1, **on) < _EMPTY, self._empty, rows)
        tau = torch.randint(len(self._alphas), (batch,), **on)
        noise = torch.randn(x_data.shape, **on)
        alpha = self._alphas[tau].reshape(-1, 1, 1, 1)
        return [alpha.sqrt() * x_data + (1 - alpha).sqrt() * noise, noise, tau, rows]

    def _compute(self) -> None:
        """The loss of the batch that is given, and its gradients."""
        x_diff, noise, tau, rows = self._given
        context = self.network.words.of_places(rows)
        with torch.autocast(self._device.type, torch.bfloat16, self._device.type == "cuda", cache_enabled=False):
            made = self.network(x_diff, tau, context)[0]
        loss = (self._weights[tau] * (made.float() - noise).square().mean(dim=(1, 2, 3))).mean()
        loss.backward()
        self._loss.copy_(loss.detach())

    def _graph(self) -> Callable[[], Any]:
        """The same, replayed from a CUDA graph: the network is so small that starting its kernels would take longest.

        Where that fails, the ordinary calls.
        """
        torch.backends.cudnn.benchmark = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._eagerly()
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._compute()
        except RuntimeError as error:
            log.warning("without a CUDA graph: %s", error)
            torch.cuda.synchronize()
            return self._eagerly
        return graph.replay

    def _eagerly(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._compute()

    def _update(self, elapsed: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.rate_at(self.step, elapsed)
        nn.utils.clip_grad_norm_(self._parameters, self._plan.clip)
        self._optimizer.step()
        decay = min(self._plan.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, [p.detach() for p in self._parameters], 1.0 - decay)
        self.step += 1


def levels() -> tuple[Tensor, Tensor]:
    """alpha_bar and the weight of eps' squared error, both (1000,) by tau: sqrt(1 + 1/SNR) · min(SNR, 5)/SNR, mean 1.

    The first factor is half of the way (in the exponent) from eps to velocity: what a picture shows is decided where
    there is much noise and an error of eps moves the picture far.
    """
    alphas = torch.as_tensor(NoiseSchedule.scaled_linear().alphas_cumprod).float()
    ratio = alphas / (1 - alphas)
    weights = (1 + 1 / ratio).sqrt() * ratio.clamp(max=_SNR_CAP) / ratio
    return alphas, weights / weights.mean()


def _commit() -> str:
    """The repository's commit, or "" outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""

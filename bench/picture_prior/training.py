"""Trains the network for as long as there is time, and goes on later: on the same machine exactly, elsewhere from the
stored weights with a short warm-up.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...alignment import NoiseSchedule
from ..short_training import Plan
from . import autoencoder, captions, data, latents, stored, words
from .captions import Captions
from .latents import Latents
from .long_training import LongTraining
from .network import Network, millions
from .stored import Prior

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

log = logging.getLogger(__name__)
EMPTY = 0.1
"""Share of pictures that are learned without a caption."""
_LAST = 5.0
_SNR_CAP = 5.0
_FOREVER = 10**9
_SAVED_EVERY = 300.0
_LOGGED_EVERY = 50


@dataclass(frozen=True)
class OpenPlan(Plan):
    """A plan that may have no end: the rate stays for `hold` steps and then falls with one over the root of the step.

    With an end in sight (`ends`) it falls to nothing over the last fifth of all steps, which makes pictures sharper.

    Args:
        hold: steps of the full rate.
        began: step at which the optimizer's moments began; the rate rises from there.
        batch: pictures a step.
        ends: last step; 0: none.
    """

    hold: int = 4000
    began: int = 0
    batch: int = 32
    ends: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, 0 being the first."""
        rise = min(1.0, (step - self.began + 1) / max(self.warm_up, 1))
        fall = min(1.0, _LAST * (1.0 - step / self.ends)) if self.ends else 1.0
        return self.rate * rise * max(0.0, fall) * min(1.0, (self.hold / max(step, 1)) ** 0.5)


PLAN = OpenPlan(steps=_FOREVER, rate=1.5e-3, warm_up=200, average=0.9995, save_every=float("inf"))


class Stopped(Exception):
    """The process was asked to end."""


class Task:
    """The loss of one step.

    Args:
        network: that is trained.
        pictures: what is learned from.
        z: their latents.
        batch: pictures a step.
    """

    def __init__(self, network: Network, pictures: data.Pictures, z: Latents, batch: int) -> None:
        self._network, self._latents, self._batch = network, z, batch
        self._count, self._captions = len(pictures.about), Captions(pictures.about)
        self._mirrored = torch.tensor([picture.mirrored for picture in pictures.about])
        self.stopping = False

    def loss(self, random: torch.Generator) -> Tensor:
        """Of a batch that is drawn with the generator.

        Raises:
            Stopped: the process was asked to end.
        """
        if self.stopping:
            raise Stopped
        place = torch.randint(0, self._count, (self._batch,), generator=random)
        variant = torch.randint(0, len(self._latents.z), (self._batch,), generator=random)
        empty = torch.rand(self._batch, generator=random) < EMPTY
        texts = ["" if none else self._captions.drawn(int(i), random) for i, none in zip(place, empty, strict=True)]
        context = self._network.words(captions.padded(texts, words.LENGTH))
        return weighted_loss(self._network, self._latents.x_data(variant, place), context, random)


def weighted_loss(network: Network, x_data: Tensor, context: Tensor, random: torch.Generator) -> Tensor:
    """Mean squared error of eps at random tau, weighted sqrt(1 + 1/SNR) · min(SNR, 5)/SNR.

    The first factor is half of the way (in the exponent) from eps to velocity: what a picture shows is decided where
    there is much noise and an error of eps moves the picture far. Weights have mean 1 over tau.

    Args:
        x_data: (B, 4, h, w), mean 0 and std 1.
        context: (B, 24, 128).
        random: of tau and noise.
    """
    alphas, weights = levels()
    tau = torch.randint(0, len(alphas), (len(x_data),), generator=random)
    noise = torch.randn(x_data.shape, generator=random)
    alpha = alphas[tau].reshape(-1, 1, 1, 1)
    error = network(alpha.sqrt() * x_data + (1 - alpha).sqrt() * noise, tau, context)[0] - noise
    return (weights[tau] * error.square().mean(dim=(1, 2, 3))).mean()


def levels() -> tuple[Tensor, Tensor]:
    """alpha_bar and the loss's weight, both (1000,) by tau; see `weighted_loss`."""
    alphas = torch.as_tensor(NoiseSchedule.scaled_linear().alphas_cumprod).float()
    ratio = alphas / (1 - alphas)
    weights = (1 + 1 / ratio).sqrt() * ratio.clamp(max=_SNR_CAP) / ratio
    return alphas, weights / weights.mean()


def train(work: Path, hours: float, command: str, plan: OpenPlan = PLAN) -> Path:
    """Trains up to a time, the plan's end, or until the process is asked to end; returns the stored prior's path.

    Args:
        work: folder of the pictures, the latents and the states; prior.safetensors is written there.
        hours: of computing; more by the clock where other processes compute as well.
        command: that started it, for the provenance.
    """
    pictures = data.load(work).chosen(lambda picture: not picture.held_out)
    module = ensured_autoencoder(work)
    z = latents.encode(pictures, work, variants=1)
    training, seconds = begun(pictures, work, plan)
    task = Task(training.module, pictures, z, plan.batch)  # type: ignore[arg-type]
    for request in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request, lambda *_: setattr(task, "stopping", True))
    count = len(pictures.about)
    size, variants = millions(training.module), len(z.z)
    log.info("%.2f million parameters, %d pictures x %d, step %d", size, count, variants, training.step)
    prior = Prior(training.module, module, z.mean, z.std, {})  # type: ignore[arg-type]
    _Session(training, task, work, command, seconds).run(3600.0 * hours, prior)
    return stored.path_in(work)


def begun(pictures: data.Pictures, work: Path, plan: OpenPlan) -> tuple[LongTraining, float]:
    """The training as it was last saved, and the seconds that it has had; from the stored weights, or from nothing.

    Args:
        pictures: whose captions are learned, where nothing is stored yet.
    """
    state, before = work / "training.safetensors", _stored(work)
    network = Network(Captions(pictures.about).tokens()) if before is None else before.network
    step = 0 if before is None else int(before.provenance["step"])
    if not state.is_file():
        plan = replace(plan, began=step)
    training = LongTraining(network, plan, state, f"1 {plan.batch}", "network")
    training.step = max(training.step, step)
    return training, 0.0 if before is None else float(before.provenance["seconds"])


def ensured_autoencoder(work: Path) -> AutoencoderTiny:
    """The work folder's autoencoder; where there is none, that of the stored prior, which is put there.

    Raises:
        RuntimeError: neither is there.
    """
    if not autoencoder.path(work).is_file():
        before = _stored(work)
        if before is None:
            raise RuntimeError(
                "there is no autoencoder: run 'python -m diff2flow_nodes.bench.picture_prior autoencoder'"
            )
        autoencoder.write(before.autoencoder, work)
    return autoencoder.read(work)


def _stored(work: Path) -> Prior | None:
    try:
        return stored.read(stored.newest(work))
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Clocks:
    """Seconds by the wall's clock, and those that this process computed."""

    wall: float
    computing: float

    @classmethod
    def now(cls) -> Clocks:
        """Now."""
        return cls(time.monotonic(), time.process_time())


class _Session:
    """One process's share of the training.

    Args:
        training: as it was begun.
        task: what is learned.
        work: folder of the states.
        command: that started it.
        before: seconds of computing before this.
    """

    def __init__(self, training: LongTraining, task: Task, work: Path, command: str, before: float) -> None:
        self._training, self._task, self._work, self._command, self._before = training, task, work, command, before
        self._plan: OpenPlan = training.plan  # type: ignore[assignment]
        self._losses: list[float] = []

    def run(self, seconds: float, prior: Prior) -> None:
        """Trains for that long, not counting what other processes take of the processor.

        Args:
            prior: whose autoencoder and moments are stored with the network.
        """
        start, saved, self._logged = time.process_time(), time.monotonic(), Clocks.now()
        try:
            while time.process_time() - start < seconds and not 0 < self._plan.ends <= self._training.step:
                self._losses.append(self._training.one(self._task.loss))
                if self._training.step % _LOGGED_EVERY == 0:
                    self._report()
                if time.monotonic() - saved > _SAVED_EVERY:
                    self._save(time.process_time() - start, prior)
                    saved = time.monotonic()
        except Stopped:
            log.info("asked to end")
        self._save(time.process_time() - start, prior)

    def _report(self) -> None:
        now, step, count = Clocks.now(), self._training.step, len(self._losses) * self._plan.batch
        wall, computing = count / (now.wall - self._logged.wall), count / (now.computing - self._logged.computing)
        loss, rate = sum(self._losses) / len(self._losses), self._plan.rate_at(step)
        log.info("step %d, loss %.4f, %.1f pictures/s (%.1f alone), rate %.2e", step, loss, wall, computing, rate)
        self._losses.clear()
        self._logged = now

    def _save(self, seconds: float, prior: Prior) -> None:
        self._training.save()
        about = {
            "step": self._training.step,
            "pictures": self._training.step * self._plan.batch,
            "seconds": round(self._before + seconds),
            "machine": "CPU, 1 thread",
            "command": self._command,
            "commit": commit(),
            "packages": data.versions(),
            "plan": {key: value for key, value in asdict(self._plan).items() if key not in ("steps", "save_every")},
        }
        path, network = stored.path_in(self._work), self._training.averaged_copy()
        stored.write(path, replace(prior, network=network, provenance=about))  # type: ignore[arg-type]
        log.info("saved at step %d: %.2f MB", self._training.step, path.stat().st_size / 1e6)


def commit() -> str:
    """The repository's commit, or "" outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""

"""Trains the tiny prior: a slim SD1.5 checkpoint of handwritten digits, or of scenes, that stock ComfyUI loads.

    python -m diff2flow_nodes.bench.tiny_prior --quality demo --models models

The file becomes models/checkpoints/tiny_prior_demo.safetensors; a finished one is used again, an interrupted training
goes on where its state was last saved (models/tiny_prior_work).
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files import written_whole
from . import classifier, digits, ldm_layout, subjects, text_weights, tiny_taesd, tiny_unet
from .random_prior import build_random
from .scene_prior import SceneSubject
from .shape_prior import ShapeSubject
from .short_training import Plan, ShortTraining
from .subjects import Subject, some_empty, text_encoder
from .widen import narrowed, widened

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, UNet2DConditionModel

log = logging.getLogger(__name__)

WIDTH = 320
CFG = 3.0
"""Guidance that the prior is judged with; the one to use."""
_VERSION = 1
_KEY = "diff2flow.tiny_prior"
_ACCURACY = "diff2flow.accuracy_50_steps"
_AUTOENCODER = "diff2flow.autoencoder."
_PLAIN_SHARE = 3


@dataclass(frozen=True)
class Quality:
    """How much is trained.

    Args:
        name: part of the file's name.
        autoencoder, unet: plans.
        autoencoder_batch, unet_batch: images a step.
        copies: channels of the stored UNet for one that is trained (1, 2, 5 or 10).
        wordings: captions of digits.CAPTIONS that are learned; only the first is the quickest.
        variants: drawings of each digit, slightly moved if there is more than one.
        accuracy: share of 50-step samples that must be read right; the UNet is trained again until they are. 0: once.
        judged: number of samples for that.
        rounds: at most.
        seed: of everything.
    """

    name: str
    autoencoder: Plan
    unet: Plan
    autoencoder_batch: int = 12
    unet_batch: int = 16
    copies: int = 5
    wordings: int = len(digits.CAPTIONS)
    variants: int = 1
    accuracy: float = 0.0
    judged: int = 500
    rounds: int = 1
    seed: int = 0

    @property
    def key(self) -> str:
        """Tells files of other settings apart."""
        return hashlib.sha256(repr((_VERSION, sorted(asdict(self).items()))).encode()).hexdigest()[:16]

    def subject(self, work: Path) -> Subject:
        """What is trained on: digits.

        Args:
            work: folder for what can be used again after an interruption.
        """
        return DigitSubject(self.wordings, self.variants, self.seed)


@dataclass(frozen=True)
class SceneQuality(Quality):
    """A prior of synthetic scenes.

    Args:
        scenes: how many are trained on.
        captions: how many different captions at most.

    Raises:
        ValueError: an accuracy is asked for.
    """

    scenes: int = 6000
    captions: int = 1000

    def __post_init__(self) -> None:
        if self.accuracy:
            raise ValueError(f"the classifier reads no scenes; leave accuracy 0 instead of {self.accuracy}")

    def subject(self, work: Path) -> Subject:
        """What is trained on: scenes, and for the autoencoder their depth."""
        return SceneSubject(self.scenes, self.captions, work, self.key)


@dataclass(frozen=True)
class ShapeQuality(Quality):
    """A prior of flat coloured shapes.

    Args:
        shapes: pictures that it is trained on.

    Raises:
        ValueError: an accuracy is asked for.
    """

    shapes: int = 3000

    def __post_init__(self) -> None:
        if self.accuracy:
            raise ValueError(f"the classifier of digits reads no shapes; leave accuracy 0 instead of {self.accuracy}")

    def subject(self, work: Path) -> Subject:
        """What is trained on: shapes."""
        return ShapeSubject(self.shapes)


_QUICK_AUTOENCODER, _QUICK_UNET = Plan(steps=15, rate=1e-3, warm_up=5, average=0.9), Plan(50, rate=2e-3, warm_up=10)
QUALITIES = {
    "demo": Quality(
        "demo",
        autoencoder=Plan(steps=110, rate=1e-3, warm_up=20, average=0.98),
        unet=Plan(steps=1120, rate=2e-3),
    ),
    "bench": Quality(
        "bench",
        autoencoder=Plan(steps=1500, rate=1e-3, warm_up=20, average=0.995),
        unet=Plan(steps=5000, rate=2e-3, warm_up=100, average=0.999, save_every=300.0),
        variants=4,
        accuracy=0.97,
        rounds=8,
    ),
    "quick": Quality(
        "quick",
        autoencoder=_QUICK_AUTOENCODER,
        unet=_QUICK_UNET,
        copies=10,
        wordings=1,
    ),
    "scenes_quick": SceneQuality(
        "scenes_quick",
        autoencoder=_QUICK_AUTOENCODER,
        unet=_QUICK_UNET,
        copies=10,
        scenes=100,
        captions=30,
    ),
    "scenes": SceneQuality(
        "scenes",
        autoencoder=Plan(steps=1000, rate=1e-3, warm_up=20, average=0.99),
        unet=Plan(steps=5000, rate=2e-3, warm_up=100, average=0.999, save_every=300.0),
    ),
    "digits": Quality(
        "digits",
        autoencoder=Plan(steps=300, rate=1e-3, warm_up=20, average=0.99),
        unet=Plan(steps=2000, rate=2e-3, warm_up=100, average=0.998, save_every=300.0),
        variants=2,
        accuracy=0.97,
        judged=150,
        rounds=3,
    ),
    "scenes_short": SceneQuality(
        "scenes_short",
        autoencoder=Plan(steps=400, rate=1e-3, warm_up=20, average=0.99),
        unet=Plan(steps=1600, rate=2e-3, warm_up=100, average=0.998, save_every=300.0),
        scenes=2000,
        captions=250,
    ),
    "shapes_quick": ShapeQuality(
        "shapes_quick",
        autoencoder=_QUICK_AUTOENCODER,
        unet=_QUICK_UNET,
        copies=10,
        shapes=60,
    ),
    "shapes": ShapeQuality(
        "shapes",
        autoencoder=Plan(steps=450, rate=1e-3, warm_up=20, average=0.99),
        unet=Plan(steps=2000, rate=2e-3, warm_up=100, average=0.998),
    ),
}


def ensure(name: str, models: Path) -> Path:
    """The checkpoint of a quality by its name, such as "demo" or "bench"; trained if it is not there yet.

    Args:
        models: the models folder.

    Raises:
        ValueError: another name.
    """
    if name not in QUALITIES:
        raise ValueError(f"the quality {name!r} is none of {', '.join(QUALITIES)}")
    return build(QUALITIES[name], models)


def build(quality: Quality, models: Path) -> Path:
    """The checkpoint's path; trained if it is not there yet.

    Args:
        models: the models folder; the file is models/checkpoints/tiny_prior_<name>.safetensors.
    """
    path = Path(models) / "checkpoints" / f"tiny_prior_{quality.name}.safetensors"
    if is_finished(path, quality):
        log.info("%s is there already", path)
        return path
    work = Path(models) / "tiny_prior_work" / quality.name
    text, subject = text_weights.clip_l(quality.seed), quality.subject(work)
    autoencoder = train_autoencoder(quality, subject, work)
    measured = {_AUTOENCODER + key: f"{value:.4f}" for key, value in subject.measured(autoencoder).items()}
    log.info("the autoencoder of %s is trained %s", quality.name, measured or "")
    z = torch.cat([tiny_taesd.encode(autoencoder, pictures) for pictures in subject.pictures()])
    scale, shift = tiny_taesd.file_scale(z)
    unet, accuracy = train_unet(quality, subject.labels, z, autoencoder, subject.captions(text), work)
    state = ldm_layout.checkpoint(
        {key: value.half() for key, value in ldm_layout.unet_to_ldm(wide_state(unet, quality), 1).items()},
        ldm_layout.taesd_to_comfy(autoencoder.state_dict(), scale, shift),
        text,
    )
    _write(path, state, {_KEY: quality.key, _ACCURACY: "" if accuracy is None else f"{accuracy:.4f}"} | measured)
    shutil.rmtree(work, ignore_errors=True)
    log.info("%s: %.0f MB", path, path.stat().st_size / 1e6)
    return path


def ensure_narrow(name: str, models: Path) -> Path:
    """The same network as narrow as it was trained, for whoever samples a lot: 19 times fewer weights (bench, demo).

    Only headless loads it; ComfyUI knows Stable Diffusion by its 320 channels. Its LoRAs fit the narrow file alone.

    Args:
        name: of a quality.
        models: the models folder; the file is models/checkpoints/tiny_prior_<name>_narrow.safetensors.
    """
    from safetensors import safe_open

    wide, quality = ensure(name, models), QUALITIES[name]
    path = wide.with_name(f"{wide.stem}_narrow.safetensors")
    if is_finished(path, quality):
        return path
    with safe_open(str(wide), framework="pt") as file:
        state = {key: file.get_tensor(key) for key in list(file.keys())}
        metadata = {key: value for key, value in (file.metadata() or {}).items() if key.startswith("diff2flow.")}
    like = ldm_layout.unet_to_ldm(tiny_unet.trainable_unet(WIDTH // quality.copies, quality.seed).state_dict(), 1)
    unet = narrowed({key: state[ldm_layout.UNET_PREFIX + key] for key in like}, like, quality.copies)
    state |= {ldm_layout.UNET_PREFIX + key: value.contiguous() for key, value in unet.items()}
    _write(path, state, metadata)
    return path


def is_finished(path: Path, quality: Quality) -> bool:
    """Whether the file is there and was trained with these settings."""
    from safetensors import safe_open

    if not path.is_file():
        return False
    with safe_open(str(path), framework="pt") as file:
        return (file.metadata() or {}).get(_KEY) == quality.key


class Captions:
    """The embeddings of all captions the prior is trained with, by the text encoder that sampling uses.

    Args:
        text: weights of `text_weights.clip_l`.
        templates: wordings, of digits.CAPTIONS; drawn equally often.

    Attributes:
        usual: (10, 77, 768), "a handwritten three" and so on.
        empty: (1, 77, 768).
    """

    def __init__(self, text: Mapping[str, Tensor], templates: Sequence[str]) -> None:
        encoder = text_encoder(text)
        rows = {t: [encoder.encode(digits.caption(i, t))[0][0] for i in range(10)] for t in set(templates)}
        self.empty = encoder.encode("")[0][0]
        self._by_template = torch.stack([torch.cat(rows[template]) for template in templates])
        self.usual = self._by_template[0]

    def drawn(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """A caption's embedding (B, 77, 768) for each label, in any of the wordings; a tenth are empty."""
        template = torch.randint(0, len(self._by_template), labels.shape, generator=random)
        return some_empty(self._by_template[template, labels], self.empty, random)


class DigitSubject:
    """Plain handwritten digits; the autoencoder learns them in all colours, slants and widths as well.

    Args:
        wordings: how many of digits.CAPTIONS.
        variants: drawings of each digit.
        seed: of how they are moved.
    """

    def __init__(self, wordings: int, variants: int, seed: int) -> None:
        self._images, labels = digits.split(held_out=False)
        self._wordings, self._variants, self._seed = wordings, variants, seed
        self._labels = labels.repeat(variants)

    @property
    def labels(self) -> Tensor:
        """(variants · N,), the digits."""
        return self._labels

    def pictures(self) -> Iterator[Tensor]:
        """The plain digits, all of one variant together."""
        random, plain = torch.Generator().manual_seed(self._seed), digits.STYLES["plain"]
        yield digits.render(self._images, plain)
        for _ in range(self._variants - 1):
            yield digits.render(digits.moved(self._images, random), plain)

    def shown(self, count: int, random: torch.Generator) -> tuple[Tensor, int]:
        """A third plain, the others in all colours, slants and widths."""
        chosen, plain = (
            self._images[torch.randint(0, len(self._images), (count,), generator=random)],
            count // _PLAIN_SHARE,
        )
        pictures = [digits.render(chosen[:plain], digits.STYLES["plain"]), digits.varied(chosen[plain:], random)]
        return torch.cat(pictures), plain

    def captions(self, text: Mapping[str, Tensor]) -> Captions:
        """In as many wordings as asked for."""
        return Captions(text, digits.CAPTIONS[: self._wordings])

    def measured(self, autoencoder: AutoencoderTiny) -> dict[str, float]:
        """Nothing: the classifier judges the samples."""
        return {}


def train_autoencoder(quality: Quality, subject: Subject, work: Path) -> AutoencoderTiny:
    """The autoencoder, trained on what the subject shows it."""
    module = tiny_taesd.block_mean_autoencoder(quality.seed)

    def loss(random: torch.Generator) -> Tensor:
        return tiny_taesd.reconstruction_loss(module, *subject.shown(quality.autoencoder_batch, random), random)

    training = ShortTraining(module, quality.autoencoder, work / "autoencoder.safetensors", quality.key, "autoencoder")
    training.run(loss)
    return training.averaged()


def train_unet(
    quality: Quality,
    labels: Tensor,
    z: Tensor,
    autoencoder: AutoencoderTiny,
    captions: subjects.Captions,
    work: Path,
) -> tuple[UNet2DConditionModel, float | None]:
    """The UNet, as narrow as it is trained, and the share of its samples that is read right (None: not asked for).

    Args:
        labels: (N,), which caption each picture has.
        z: (N, 4, 8, 8) of the pictures.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = tiny_unet.trainable_unet(WIDTH // quality.copies, quality.seed).to(device)
    mean, std = z.mean(), z.std()

    def loss(random: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(z), (quality.unet_batch,), generator=random)
        x_data, context = (z[chosen] - mean) / std, captions.drawn(labels[chosen], random)
        return tiny_unet.denoising_loss(unet, x_data.to(device), context.to(device), random)

    accuracy = None
    for number in range(quality.rounds):
        title = "network" if quality.rounds == 1 else f"network, round {number + 1}"
        plan = replace(quality.unet, seed=quality.unet.seed + number)
        training = ShortTraining(unet, plan, work / f"unet_{number}.safetensors", quality.key, title)
        training.run(loss)
        training.averaged()
        if quality.accuracy:
            accuracy = accuracy_of(unet, autoencoder, captions, (mean, std), quality.judged)
            log.info("%s: %.1f %% of %d samples in 50 steps are read right", title, 100 * accuracy, quality.judged)
        if accuracy is None or accuracy >= quality.accuracy:
            break
    return unet, accuracy


def accuracy_of(
    unet: UNet2DConditionModel,
    autoencoder: AutoencoderTiny,
    captions: Captions,
    moments: tuple[Tensor, Tensor],
    count: int,
    steps: int = 50,
    cfg: float = CFG,
) -> float:
    """Share of samples that the classifier reads as the digit they were asked for.

    Args:
        moments: mean and standard deviation of z.
        count: number of samples, all digits in turn.
    """
    device = next(unet.parameters()).device
    wanted = torch.arange(count) % len(digits.WORDS)
    x_data = tiny_unet.samples(unet, captions.usual[wanted].to(device), captions.empty.to(device), steps, cfg, seed=1)
    pictures = tiny_taesd.decode(autoencoder, x_data.cpu() * moments[1] + moments[0])
    return float((classifier.classify(pictures) == wanted).float().mean())


def wide_state(unet: UNet2DConditionModel, quality: Quality) -> dict[str, Tensor]:
    """The state dict at 320 channels."""
    wide = tiny_unet.random_unet(tiny_unet.unet_config(), quality.seed).state_dict()
    narrow = {key: value.cpu() for key, value in unet.state_dict().items()}
    return widened(narrow, wide, quality.copies, quality.seed)


def _write(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    described = {"modelspec.title": f"Diff2Flow {path.stem}", "modelspec.architecture": "stable-diffusion-v1"}
    with written_whole(path) as temporary:
        save_file(dict(state), str(temporary), metadata=described | metadata)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    name = "python -m diff2flow_nodes.bench.tiny_prior"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    parser.add_argument("--quality", choices=(*QUALITIES, "random"), default="demo", help="random: not trained")
    parser.add_argument("--models", type=Path, required=True, help="models folder, outside git")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.quality == "random":
        log.info("%s", build_random(options.models / "checkpoints" / "tiny_random.safetensors"))
    else:
        ensure(options.quality, options.models)


if __name__ == "__main__":
    main()

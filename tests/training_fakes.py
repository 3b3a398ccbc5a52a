"""A small network, encoders and a host for the tests of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diff2flow_nodes.alignment import NoiseSchedule
from diff2flow_nodes.files import confined
from diff2flow_nodes.hosts import HostError, ModelFacts
from diff2flow_nodes.training.dataset import Item, LatentDataset, context_key
from diff2flow_nodes.training.finetune import Job, Keeping, Watch
from diff2flow_nodes.training.identity import Identity
from diff2flow_nodes.training.layers import LoraSettings
from diff2flow_nodes.training.product import Output
from diff2flow_nodes.training.settings import TrainSettings
from diff2flow_nodes.training.shards import ShardStore

CONTEXT_WIDTH = 6
BLOCK = "down_blocks.0.attentions.0"
FILE_NAMES = {
    "first": "conv_in",
    "time": "time_embedding.linear_1",
    "mix": "down_blocks.0.resnets.0.conv1",
    "inner.into": f"{BLOCK}.proj_in",
    "inner.q": f"{BLOCK}.transformer_blocks.0.attn1.to_q",
    "inner.text": f"{BLOCK}.transformer_blocks.0.attn2.to_k",
    "inner.text_out": f"{BLOCK}.transformer_blocks.0.attn2.to_out.0",
    "inner.ff": f"{BLOCK}.transformer_blocks.0.ff.net.0.proj",
    "last": "conv_out",
}


class TinyNetwork(nn.Module):
    """Every kind of layer that is trained, with biases, on (B, 4, h, w) and a context."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.time = nn.Linear(2, width)
        self.mix = nn.Conv2d(width, width, 3, padding=1, stride=1)
        self.inner = nn.ModuleDict(
            {
                "into": nn.Conv2d(width, width, 1),
                "q": nn.Linear(width, width),
                "text": nn.Linear(CONTEXT_WIDTH, width, bias=False),
                "text_out": nn.Linear(width, width),
                "ff": nn.Linear(width, width),
            }
        )
        self.last = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
        time = self.time(torch.stack([tau / 1000, (tau / 1000) ** 2], dim=1))
        h = self.first(x) + time[:, :, None, None]
        h = h + self.mix(torch.tanh(h))
        h = self.inner["into"](h)
        tokens = h.flatten(2).transpose(1, 2)
        text = self.inner["text_out"](self.inner["text"](context).mean(dim=1, keepdim=True))
        tokens = tokens + torch.tanh(self.inner["q"](tokens)) + text
        tokens = tokens + self.inner["ff"](torch.tanh(tokens))
        return self.last(torch.tanh(tokens).transpose(1, 2).reshape(h.shape))


class TinyBackbone:
    """The port's Backbone around a TinyNetwork; remembers the calls."""

    def __init__(self, prediction: str = "eps", network: nn.Module | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.module: nn.Module = network or TinyNetwork()
        self.family, self.prediction = "SD1", prediction
        self.schedule = NoiseSchedule.scaled_linear()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.base_name, self.base_hash = "tiny.safetensors", "ab" * 32
        self.base_path: Path | None = None
        self.text: Any = None
        self.batch_sizes: list[int] = []

    def __call__(self, x_diff: Tensor, tau: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        self.batch_sizes.append(len(x_diff))
        return self.module(x_diff, tau.float(), conditioning["context"])

    def conditioning(self, context: Tensor, pooled: Tensor | None, sizes: Tensor) -> dict[str, Tensor]:
        return {"context": context}

    def scale_latent(self, latent: Tensor) -> Tensor:
        return latent * 0.5

    def unscale_latent(self, x_data: Tensor) -> Tensor:
        return x_data / 0.5

    def layer_names(self) -> Mapping[str, str]:
        return FILE_NAMES

    @contextmanager
    def holding(self, insertion: Any) -> Any:
        try:
            yield
        finally:
            insertion.remove()

    def ready(self) -> None:
        pass

    def free_memory(self) -> None:
        pass

    @contextmanager
    def sampled(self) -> Any:
        yield self

    def checkpoint_names(self) -> Mapping[str, str]:
        names = [name for name, _ in self.module.named_parameters(remove_duplicate=False)]
        return {name: f"model.diffusion_model.{name}" for name in names}


class TinyText:
    """The port's TextBackbone around two layers; a caption's tokens are its letters."""

    def __init__(self, width: int = CONTEXT_WIDTH) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.layers = nn.ModuleDict({"q": nn.Linear(width, width), "fc": nn.Linear(width, width)})
        self.modules = {"lora_te": self.layers}

    def layer_names(self, prefix: str) -> Mapping[str, str]:
        layer = "text_model.encoder.layers.0"
        return {"q": f"{layer}.self_attn.q_proj", "fc": f"{layer}.mlp.fc1"}

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        width = self.layers["q"].weight.shape[1]
        letters = torch.tensor([[ord(letter) for letter in f"{caption:8.8}"] for caption in captions])
        tokens = torch.sin(letters[..., None] * torch.arange(1, width + 1))
        return tokens + torch.tanh(self.layers["fc"](torch.tanh(self.layers["q"](tokens)))), None


class SilentProgress:
    """Remembers what it is told; raises at a step if asked to."""

    def __init__(self, raise_at: int | None = None, error: BaseException | None = None) -> None:
        self.updates: list[tuple[int, str]] = []
        self.events: list[Mapping[str, Any]] = []
        self.closed = False
        self.commands: dict[int, str] = {}
        self._asked = 0
        self._raise_at, self._error = raise_at, error

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        self.updates.append((done, text))
        if done == self._raise_at and self._error is not None:
            raise self._error

    def event(self, entry: Mapping[str, Any]) -> None:
        self.events.append(entry)

    def command(self) -> str:
        """What `commands` says for the step, counted by the calls: every step asks once."""
        self._asked += 1
        return self.commands.get(self._asked, "")

    def close(self) -> None:
        self.closed = True


def tiny_dataset(folder: Path, count: int = 3, channels: int = 4, width: int = CONTEXT_WIDTH) -> LatentDataset:
    """Latents (channels, 4, 4) and a caption each."""
    draw = torch.Generator().manual_seed(5)
    latents, texts = ShardStore(folder / "latents"), ShardStore(folder / "texts")
    items = []
    for i in range(count):
        caption = f"a drawing, number {i}"
        latents.add({f"image{i}": torch.randn(1, channels, 4, 4, generator=draw)})
        texts.add({context_key(caption): torch.randn(1, 3, width, generator=draw)})
        items.append(Item(f"{i}.png", caption, f"image{i}", 32, 32))
    texts.add({context_key(""): torch.randn(1, 3, width, generator=draw)})
    latents.flush()
    texts.flush()
    return LatentDataset("drawings", tuple(items), latents, texts)


def tiny_job(
    folder: Path,
    backbone: Any = None,
    lora: LoraSettings | None = None,
    dataset: LatentDataset | None = None,
    name: str = "style",
    watch: Watch | None = None,
    keeping: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Job:
    """A finetuning of the small network, everything of it in `folder`."""
    loras = folder / "loras"
    loras.mkdir(exist_ok=True, parents=True)
    return Job(
        backbone or TinyBackbone(),
        dataset or tiny_dataset(folder / "data"),
        lora or LoraSettings(rank=4, alpha=4.0),
        TrainSettings(**{"steps": 5, "batch_size": 4, "learning_rate": 1e-2, **settings}),
        Output(loras, name, "fp32", recommended_steps=12, recommended_cfg=4.5),
        Keeping(folder / "runs", **{"save_every": 0, **(keeping or {})}),
        watch or Watch(),
    )


class FakeHost:
    """As much of a host as the training nodes use; counts what is encoded."""

    name = "fake"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.encoded: list[str] = []
        self.inversion_files: dict[str, str] = {}
        self.applied: list[tuple[dict[str, Tensor], float, Mapping[str, str]]] = []
        self.backbone = TinyBackbone()
        self.progress_bar = SilentProgress()

    def folder(self, kind: str) -> Path:
        folder = self.root / kind
        folder.mkdir(exist_ok=True)
        return folder

    def path(self, kind: str, name: str) -> Path:
        path = confined(self.folder(kind), name)
        if not path.exists():
            raise HostError(f"there is no '{name}' in the folder '{kind}'")
        return path

    def facts(self, model: Any) -> ModelFacts:
        return ModelFacts("SD1", "eps", NoiseSchedule.scaled_linear(), 4)

    def encode_text(self, clip: Any, text: str) -> Any:
        self.encoded.append(f"text:{text}")
        context = torch.full((1, 3, CONTEXT_WIDTH), float(len(text)) / 10)
        return [[context, {"pooled_output": torch.ones(1, 2)}]]

    def encode_image(self, vae: Any, image: Tensor) -> Tensor:
        self.encoded.append("image")
        return nn.functional.avg_pool2d(image.movedim(-1, 1), 8)[:, [0, 1, 2, 0]]

    def fingerprint(self, thing: Any) -> Identity:
        return Identity(str(thing))

    def inversions_state(self) -> str:
        return repr(sorted(self.inversion_files.items()))

    def inversions(self, clip: Any, names: Sequence[str]) -> dict[str, str]:
        return {name: self.inversion_files[name] for name in names if name in self.inversion_files}

    def sampling_patches(self, model: Any) -> tuple[str, ...]:
        return ()

    @contextmanager
    def training(self, model: Any, clip: Any = None) -> Any:
        yield self.backbone

    def progress(self, total: int, title: str) -> SilentProgress:
        return self.progress_bar

    def apply_lora(self, model: Any, clip: Any, state: Any, strength: float, metadata: Any) -> tuple[Any, Any]:
        self.applied.append((state, strength, metadata))
        return f"{model}+lora", clip

"""What is measured inside ComfyUI, on its own python: a line of JSON each, see `findings`.

    COMFYUI_DIR=... python inside_comfy.py FOLDER CHECKPOINT SLIM [--device cuda] [--disable-dynamic-vram] [--card GIB]

FOLDER/models/checkpoints holds both checkpoints: the first is sampled and trained, the second trained by every preset.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import patch

BENCH = Path(__file__).resolve().parent.parent
sys.path[0] = str(BENCH)
NOT_NEEDED = ("av", "kornia", "spandrel", "comfy_angle", "simpleeval", "blake3")
"""What ComfyUI imports and a lent machine may lack."""


class _Any(type):
    """A class that has, under every name, another one."""

    def __getattr__(cls, name: str) -> _Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Any(name, (), {})


class _Nothing(types.ModuleType):
    """A module in which every name is such a class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> _Any:
        return getattr(_Any("Nothing", (), {}), name)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages, and whatever is said to be in them, that are not installed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._missing = {name for name in names if importlib.util.find_spec(name) is None}

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self._missing else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


sys.meta_path.append(_StandIns(NOT_NEEDED))

from comfy_process import DEVICE, arguments, dynamic_vram, pack  # noqa: E402  (starts ComfyUI)

# isort: split
import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from costs import interleaved, medians, ratios, seconds_on  # noqa: E402
from sampling_cost import bare_calls  # noqa: E402

import nodes as stock  # noqa: E402
from diff2flow_nodes.bench.gpu.drawing import trained, trainings  # noqa: E402
from diff2flow_nodes.bench.gpu.findings import Findings  # noqa: E402
from diff2flow_nodes.bench.gpu.setting import node  # noqa: E402
from diff2flow_nodes.hosts.comfy import encoders  # noqa: E402

_CFG, _BATCH = 4.0, 4
_SMALL = DEVICE == "cpu"
Loaded = tuple[Any, Any, Any]
"""MODEL, CLIP, VAE."""


def main() -> None:
    """Every part in turn."""
    given = _parsed()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    _use_folders(given.folder)
    findings = Findings(given.folder / "inside_comfy.jsonl", given.seconds)
    with torch.inference_mode(), _card(given.card):
        loaded = _loaded(given.checkpoint)
        model = loaded[0]
        about = {"dtype": str(model.model.get_dtype()), "cast": str(model.model.manual_cast_dtype)}
        findings.tell(dynamic_vram=dynamic_vram(), card_gib=given.card, comfyui=_version(), **about)
        findings.case("sampling", partial(sampling, loaded), family="SD1.5", of="sampling")
        findings.case(
            "training", partial(training, loaded, "light", False), preset="light", checkpoint=given.checkpoint
        )
        slim = loaded if given.slim == given.checkpoint else _loaded(given.slim)
        for preset, text in trainings(_SMALL):
            what, about = f"{preset}, text encoder" if text else preset, {"preset": preset, "text_encoder": text}
            findings.case(what, partial(training, slim, preset, text), checkpoint=given.slim, **about)
        findings.case("unloaded while a sample is decoded", partial(unloaded, slim), of="unloading")
        findings.case("sampling after all that", partial(sampling, loaded), family="SD1.5", of="sampling afterwards")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("slim")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--card", type=float, default=0.0, help="GiB of a pretended card; 0: the whole one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--disable-dynamic-vram", action="store_true")
    return parser.parse_args(arguments)


def _use_folders(folder: Path) -> None:
    """ComfyUI reads and writes below the folder alone."""
    models = folder / "models"
    for name in ("input", "output", "temp", "models/loras"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder_paths.models_dir = str(models)
    for name in ("input", "output", "temp"):
        setattr(folder_paths, f"{name}_directory", str(folder / name))
    for name in ("checkpoints", "loras"):
        folder_paths.folder_names_and_paths[name] = ([str(models / name)], {".safetensors"})


@contextmanager
def _card(gib: float) -> Iterator[None]:
    if not gib:
        yield
        return
    from diff2flow_nodes.bench.gpu.setting import pretended_card

    with pretended_card(gib):
        yield


def _loaded(name: str) -> Loaded:
    return node("Diff2FlowCheckpointLoader", ckpt_name=name, lora_name="None", lora_strength=1.0)[:3]


def sampling(loaded: Loaded) -> dict[str, Any]:
    """Seconds of the same sampling by our sampler, by the stock KSampler and by the bare calls, in turns."""
    model, clip, _ = loaded
    side, steps = (8, 2) if _SMALL else (64, 8)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat", ""))
    latent = {"samples": torch.zeros(_BATCH, 4, side, side)}
    ours, ksampler = pack.NODE_CLASS_MAPPINGS["Diff2FlowSampler"](), stock.KSampler()
    ways: dict[str, Callable[[], Any]] = {
        "ksampler": lambda: ksampler.sample(model, 1, steps, _CFG, "euler", "normal", positive, negative, latent, 1.0),
        "ours": lambda: ours.sample(model, positive, negative, latent, 1, steps, _CFG, "euler", 1.0, "auto"),
        "bare": bare_calls(model, positive, negative, _BATCH, side, steps),
    }
    timed = seconds_on(DEVICE)
    seconds = interleaved({name: timed(way) for name, way in ways.items()}, 1 if _SMALL else 5)
    found = {"batch": _BATCH, "side": 8 * side, "steps": steps, "median_seconds": medians(seconds)}
    return {**found, **ratios(seconds, "ksampler")}


def training(loaded: Loaded, preset: str, text: bool) -> dict[str, Any]:
    """The file of a short training with a sample and a validation on the way."""
    model, clip, vae = loaded
    return trained(preset, text, vae, model=model, clip=clip, dataset=_data(loaded))


def _data(loaded: Loaded) -> Any:
    pictures = torch.rand(4, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    captions = "\n".join(f"a drawing of {i} things" for i in range(4))
    return node("Diff2FlowImages", images=pictures, captions=captions, vae=loaded[2], clip=loaded[1])[0]


def unloaded(loaded: Loaded) -> dict[str, Any]:
    """A training over a LoRA, the network taken off the device whenever a sample is decoded."""
    decode = encoders.decode_image

    def after_unloading(*given: Any) -> Any:
        comfy.model_management.free_memory(1e30, comfy.model_management.get_torch_device())
        return decode(*given)

    with patch.object(encoders, "decode_image", after_unloading):
        return training((_with_lora(loaded[0]), *loaded[1:]), "light", False)


def _with_lora(model: Any) -> Any:
    """The model under a LoRA of random weights on its queries."""
    state, draw = {}, torch.Generator().manual_seed(1)
    for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        if key.startswith("lora_unet_down_blocks") and isinstance(target, str) and "attn1_to_q" in key:
            outputs, inputs = model.get_model_object(target.removesuffix(".weight")).weight.shape
            state[f"{key}.lora_up.weight"] = 0.02 * torch.randn(outputs, 4, generator=draw)
            state[f"{key}.lora_down.weight"] = 0.02 * torch.randn(4, inputs, generator=draw)
            state[f"{key}.alpha"] = torch.tensor(4.0)
    if not state:
        raise ValueError("no query of the model has a LoRA key")
    return comfy.sd.load_lora_for_models(model, None, state, 1.0, 1.0)[0]


def _version() -> str:
    from comfyui_version import __version__

    return __version__


if __name__ == "__main__":
    main()

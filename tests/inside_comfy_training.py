"""Checks of training inside ComfyUI's own process: its memory management, number formats, attention kernels.

Run as `inside_comfy.py` is.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from half_networks import HALF, Products, norms_as_on_cuda
from inside_comfy import bare, conditioning, difference, kohya_lora, latent, main, network, ours, text_encoder

# isort: split
import comfy.ldm.modules.attention as attention
import comfy.model_management as management
import comfy.sd
import torch

from diff2flow_nodes.bench import ldm_layout
from diff2flow_nodes.bench.tiny_taesd import block_mean_autoencoder
from diff2flow_nodes.hosts import current
from diff2flow_nodes.training.dataset import Item, LatentDataset, context_key
from diff2flow_nodes.training.finetune import Job, Keeping, Watch, finetune
from diff2flow_nodes.training.layers import GROUPS, PRESETS, LoraSettings
from diff2flow_nodes.training.product import Output
from diff2flow_nodes.training.settings import OptimizerSettings, TrainSettings
from diff2flow_nodes.training.shards import ShardStore

CPU = torch.device("cpu")
CAPTIONS = ("a cat", "a dog", "a fox", "a hen")
SMALL = LoraSettings(groups=GROUPS, rank=4, alpha=4.0, ends_in_full=True)
TEXT = LoraSettings(groups=("cross_attention",), rank=4, alpha=4.0, text_encoder=True)
DORA = LoraSettings(groups=GROUPS, rank=4, alpha=4.0, dora=True)


class Progress:
    """Calls something at every update and event; ends the run at a step if asked to."""

    def __init__(self, at_moment: Callable[[str], None] = lambda moment: None, interrupt_at: int | None = None) -> None:
        self._at_moment, self._interrupt_at = at_moment, interrupt_at

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        self._at_moment(f"update {done}")
        if done == self._interrupt_at:
            raise management.InterruptProcessingException()

    def event(self, entry: Any) -> None:
        self._at_moment(str(entry["kind"]))

    def command(self) -> str:
        return ""

    def close(self) -> None:
        pass


def dataset(folder: Path) -> LatentDataset:
    """Four latents with captions."""
    generator = torch.Generator().manual_seed(1)
    stored, texts = ShardStore(folder / "latents"), ShardStore(folder / "texts")
    items = []
    for caption in ("", *CAPTIONS):
        texts.add({context_key(caption): torch.randn(1, 77, 768, generator=generator)})
    for i, caption in enumerate(CAPTIONS):
        stored.add({f"image{i}": 5.0 * torch.randn(1, 4, 8, 8, generator=generator)})
        items.append(Item(f"{i}.png", caption, f"image{i}", 64, 64))
    stored.flush()
    texts.flush()
    return LatentDataset("check", tuple(items), stored, texts)


def base_file(model: Any, folder: Path) -> Path:
    """The network as a checkpoint, for what is trained in full."""
    from safetensors.torch import save_file

    weights = model.model.diffusion_model.state_dict()
    save_file(
        {f"model.diffusion_model.{k}": v.contiguous().clone() for k, v in weights.items()}, folder / "base.safetensors"
    )
    return folder / "base.safetensors"


def train(
    model: Any,
    lora: LoraSettings,
    progress: Progress | None = None,
    at_sample: Callable[[str], None] | None = None,
    clip: Any = None,
    options: OptimizerSettings | None = None,
    steps: int = 3,
    memory_check: bool = False,
) -> tuple[dict[str, torch.Tensor], list[float], list[torch.Tensor]]:
    """Weights, losses and samples of a run with samples, validation and states at every second step."""
    host, samples = current(), []

    def draw(training: Any, flow: Any, text: Any) -> list[Any]:
        patched = host.as_flow(training, flow)
        (at_sample or (lambda moment: None))("sample")
        drawn = ours(patched, steps=1)
        (at_sample or (lambda moment: None))("decode")
        samples.append(drawn)
        return []

    with tempfile.TemporaryDirectory() as name, torch.inference_mode(False):
        folder = Path(name)
        (folder / "loras").mkdir()
        data = dataset(folder)
        settings = TrainSettings(steps, 2, 1e-2, optimizer=options or OptimizerSettings())
        watch = Watch(sample_every=2, draw=draw, validate_every=2, held_out=data)
        with host.training(model, clip) as backbone:
            backbone.base_path = base_file(model, folder) if lora.full else None
            output = Output(folder / "loras", "check", "fp32")
            keeping = Keeping(folder / "runs", save_every=2, memory_check=memory_check)
            job = Job(backbone, data, lora, settings, output, keeping, watch)
            result = finetune(job, progress or Progress())
        state = result.state
        if lora.full:
            from safetensors.torch import load_file

            state = load_file(folder / "loras" / result.name)
        return {key: value.clone() for key, value in state.items()}, result.losses, samples


def loaded(model: Any) -> list[Any]:
    """The patchers that ComfyUI has loaded of a model's network."""
    return [each.model for each in management.current_loaded_models if each.model and each.model.model is model.model]


def unload_all(model: Any) -> None:
    """What /free and many nodes do."""
    management.unload_all_models()


def free_memory(model: Any) -> None:
    """Another model, or a decode, wants more than there is."""
    management.free_memory(1e30, CPU)


def unload_part(model: Any) -> None:
    """Another model wants some of the memory."""
    for patcher in loaded(model):
        patcher.partially_unload(CPU, patcher.model_size() // 2)


@lru_cache(maxsize=1)
def another() -> Any:
    return network(seed=3)


def load_other(model: Any) -> None:
    """Another model is loaded, and a clone of this one without what training has put into it."""
    management.free_memory(1e30, CPU)
    management.load_models_gpu([another()])
    management.load_models_gpu([model])


ACTIONS = (unload_all, free_memory, unload_part, load_other)


def disturbed(actions: Iterable[Callable[[Any], None]], model: Any) -> Callable[[str], None]:
    """One action after the other, a moment each."""
    turn = itertools.cycle(actions)
    return lambda moment: next(turn)(model)


@contextmanager
def moves() -> Iterator[list[torch.nn.Module]]:
    """The modules that are moved meanwhile."""
    to, seen = torch.nn.Module.to, []

    def spy(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return to(self, *args, **kwargs)

    torch.nn.Module.to = spy
    try:
        yield seen
    finally:
        torch.nn.Module.to = to


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def check_host_takes_the_network_away() -> dict[str, int]:
    """Whatever ComfyUI does with the network between two steps, the same LoRA is trained, and the host is as before."""
    host, found = current(), {}
    presets = {"light": PRESETS["light"], "full": PRESETS["full"], "ends": SMALL, "dora": DORA, "text": TEXT}
    for upstream in ("plain", "lora"):
        for name, lora in presets.items() if upstream == "lora" else [*presets.items()][:2]:
            model, clip = network(), text_encoder(1) if lora.text_encoder else None
            if upstream == "lora":
                model = host.apply_lora(model, None, kohya_lora(model, 1), 1.0, None)[0]
            untouched, before = host.fingerprint(model), ours(model)
            state, losses, samples = train(model, lora, clip=clip)
            for first in range(2):
                what = f"{upstream} {name} {first}"
                at_moment = disturbed(ACTIONS[2 * first :] + ACTIONS[: 2 * first], model)
                with moves() as moved:
                    again = train(model, lora, Progress(at_moment), at_moment, clip)
                assert not any(hasattr(each, "lora_A") or hasattr(each, "weight_change") for each in moved), what
                assert again[1] == losses and equal(again[0], state), what
                assert all(torch.equal(a, b) for a, b in zip(again[2], samples, strict=True)), what
                assert host.fingerprint(model) == untouched and torch.equal(ours(model), before), what
                found[what] = len(moved)
    return found


def check_interrupted_while_unloaded() -> dict[str, int]:
    """Cancel at a moment when the network is not there: what was trained is saved, and the host is as before."""
    host, found = current(), {}
    for name, lora in (("light", PRESETS["light"]), ("full", PRESETS["full"])):
        model = network()
        model = host.apply_lora(model, None, kohya_lora(model, 1), 1.0, None)[0]
        before = ours(model)
        for action in ACTIONS:
            try:
                train(model, lora, Progress(disturbed([action], model), interrupt_at=2))
            except management.InterruptProcessingException:
                found[f"{name} {action.__name__}"] = 1
            assert torch.equal(ours(model), before)
            management.unload_all_models()
            assert torch.equal(ours(model), before)
    assert len(found) == 2 * len(ACTIONS), found
    return found


def check_clones_that_outlive_training() -> dict[str, float]:
    """A clone made for a sample and kept for long is a clone of the plain model when training has ended."""
    kept, model = [], network()

    def keep(moment: str) -> None:
        kept.extend(loaded(model))

    plain = bare(model.model.diffusion_model).detach()
    train(model, SMALL, at_sample=keep)
    assert kept
    for clone in kept:
        management.load_models_gpu([clone])
        assert torch.equal(bare(clone.model.diffusion_model).detach(), plain)
    return {"clones": len(kept)}


def check_samples_of_a_part() -> dict[str, str]:
    """While samples are drawn a card may keep a part of the network: none of it where trained weights stand in for it."""
    host, found = current(), {}
    presets = {"light": PRESETS["light"], "ends": SMALL, "dora": DORA, "full": PRESETS["full"]}
    for name, lora in presets.items():
        model = host.apply_lora(network(), None, kohya_lora(network(), 1), 1.0, None)[0]
        outputs, context = [], conditioning()[0][0].repeat(2, 1, 1)

        def draw(
            training: Any, flow: Any, text: Any, outputs: list[Any] = outputs, context: Any = context
        ) -> list[Any]:
            management.load_models_gpu([training])
            for part in (0, training.model_size() // 2):
                freed = training.partially_unload(CPU, part) if part else 0
                x, times = torch.ones(2, 4, 8, 8), torch.tensor([10.0, 700.0])
                called = training.model.diffusion_model(x, times, context=context, transformer_options={})
                outputs.append((freed, called))
            return []

        with tempfile.TemporaryDirectory() as place, torch.inference_mode(False):
            folder = Path(place)
            (folder / "loras").mkdir()
            with host.training(model) as backbone:
                backbone.base_path = base_file(model, folder) if lora.full else None
                output, keeping = Output(folder / "loras", "check", "fp32"), Keeping(folder / "runs")
                settings, watch = TrainSettings(2, 2, 1e-2), Watch(sample_every=2, draw=draw)
                finetune(Job(backbone, dataset(folder), lora, settings, output, keeping, watch), Progress())
        (_, whole), (freed, part) = outputs
        found[name] = f"{freed / 2**20:.1f} MiB, {difference(part, whole):.1e}"
        assert (freed > 0) == (name in ("light", "ends")), found
        assert difference(part, whole) < 1e-5, found
    return found


def check_room_is_made() -> dict[str, int]:
    """Training asks for all that is on the device, each time it loads."""
    asked, real = [], management.load_models_gpu

    def spy(models: Any, memory_required: float = 0, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("force_full_load"):
            asked.append(memory_required)
        return real(models, memory_required, *args, **kwargs)

    management.load_models_gpu = spy
    try:
        train(network(), PRESETS["light"])
    finally:
        management.load_models_gpu = real
    assert len(asked) >= 3 and min(asked) >= 1e20, asked
    return {"loads": len(asked)}


@contextmanager
def moved_as_to_a_card() -> Iterator[list[torch.nn.Module]]:
    """A module that is sent to a device gets weights at another place, as it does where that is another device."""
    real, moved = torch.nn.Module.to, []

    def to(module: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
        module = real(module, *given, **named)
        if named.get("device") is not None or (given and isinstance(given[0], (torch.device, str))):
            module._apply(torch.Tensor.clone)
            moved.append(module)
        return module

    with patch.object(torch.nn.Module, "to", to):
        yield moved


def autoencoder() -> Any:
    """A TAESD that keeps an image's coarse colours, as ComfyUI loads it."""
    state = ldm_layout.taesd_to_comfy(block_mean_autoencoder(0).state_dict(), torch.tensor(0.18), torch.tensor(0.0))
    return comfy.sd.VAE(sd={key.removeprefix("first_stage_model."): value for key, value in state.items()})


@torch.inference_mode()
def use(model: Any, clip: Any, vae: Any) -> dict[str, torch.Tensor]:
    """A picture, a text, a latent and their fingerprints; every weight viewed."""
    host = current()
    for each in (model.model, clip.cond_stage_model, vae.first_stage_model):
        for weight in each.parameters():
            weight.reshape(-1)
    image = host.decode_image(vae, ours(model, steps=1))
    return {"image": image, "text": host.encode_text(clip, "a cat")[0][0], "latent": host.encode_image(vae, image)}


def check_weights_made_by_nodes_survive_a_move() -> dict[str, int]:
    """ComfyUI makes all weights under inference mode; training lets it move them, those of other models too."""
    with torch.inference_mode(), moved_as_to_a_card() as moved:
        mine, others = ((network(seed=seed), text_encoder(), autoencoder()) for seed in (0, 1))
        before, of_others = use(*mine), use(*others)
        for lora, clip in ((SMALL, None), (PRESETS["full"], None), (TEXT, mine[1])):
            del moved[:]
            unload_all(None)

            def decode(moment: str) -> None:
                if moment == "decode":
                    unload_all(None)
                    current().decode_image(others[2], latent()["samples"])

            _, losses, _ = train(mine[0], lora, at_sample=decode, clip=clip)
            assert len(losses) == 3 and moved
            for loaded_before, values in ((mine, before), (others, of_others)):
                after = use(*loaded_before)
                assert all(torch.allclose(after[name], value, atol=1e-4) for name, value in values.items()), lora
    return {"moved": len(moved)}


def half_networks() -> dict[str, Callable[[], Any]]:
    """Networks as cards keep them: computed in half precision, from weights of the same format or in fp8."""
    made = {str(dtype): (lambda dtype=dtype: network(stored=dtype, computed=dtype)) for dtype in HALF}
    fp8 = {"fp8": lambda: network(stored=torch.float8_e4m3fn, computed=torch.float16)}
    return {"fp32": network, **made, **fp8}


def check_half_precision_networks() -> dict[str, float]:
    """Every preset trains, validates and samples on every format, checkpointed or not, in every precision."""
    found = {}
    presets = {"light": PRESETS["light"], "ends": SMALL, "paper-base": PRESETS["paper-base"], "full": PRESETS["full"]}
    for stored, make in half_networks().items():
        for name, lora in {**presets, "text": TEXT}.items():
            for precision, checkpointing in (("auto", False), ("bf16", True), ("fp16", False)):
                clip = text_encoder(1, torch.float16) if lora.text_encoder else None
                options = OptimizerSettings(precision=precision, checkpointing=checkpointing)
                what = f"{stored} {name} {precision} {checkpointing}"
                model = make()
                before = [parameter.dtype for parameter in model.model.diffusion_model.parameters()]
                try:
                    with norms_as_on_cuda():
                        _, losses, samples = train(model, lora, clip=clip, options=options, steps=2)
                except Exception as error:
                    raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
                assert len(losses) == 2 and samples[0].isfinite().all(), what
                assert [p.dtype for p in model.model.diffusion_model.parameters()] == before, what
                found[what] = losses[-1]
    return found


def check_x0_models_are_trained_and_written() -> dict[str, str]:
    """The LoRA of a model that predicts the data itself is written, and its metadata say so."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
    from safetensors import safe_open

    [model] = ModelSamplingDiscrete().patch(network(), "x0", False)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode(False):
        folder = Path(name)
        (folder / "loras").mkdir()
        with current().training(model) as backbone:
            settings, keeping = TrainSettings(2, 2, 1e-3), Keeping(folder / "runs", memory_check=False)
            output = Output(folder / "loras", "check", "fp32")
            result = finetune(Job(backbone, dataset(folder), SMALL, settings, output, keeping), Progress())
        with safe_open(folder / "loras" / result.name, "pt") as file:
            said = file.metadata()
    assert said["diff2flow.prediction"] == said["modelspec.prediction_type"] == "x0", said
    return {key: said[key] for key in ("diff2flow.prediction", "modelspec.architecture")}


def check_fp32_is_float32() -> dict[str, float]:
    """precision fp32 on weights in half precision trains what it trains on the same weights kept in float32."""
    found = {}
    for stored in HALF:
        for name, lora in (("light", PRESETS["light"]), ("ends", SMALL)):
            half, wide = network(stored=stored, computed=stored), network(stored=stored, computed=stored)
            wide.model.diffusion_model.float()
            wide.model.model_config.set_inference_dtype(torch.float32, None)
            wide.model.diffusion_model.dtype = torch.float32
            options = OptimizerSettings(precision="fp32")
            with Products() as seen:
                narrow = train_only(half, lora, options)
            assert seen.formats == {"torch.float32"}, (stored, name, seen.formats)
            same = train_only(wide, lora, options)
            found[f"{stored} {name}"] = max(difference(narrow[0][key], same[0][key]) for key in same[0])
            assert narrow[1] == same[1] and equal(narrow[0], same[0]), found
    return found


def train_only(model: Any, lora: LoraSettings, options: OptimizerSettings) -> tuple[dict[str, Any], list[float]]:
    """Weights and losses of a run that draws nothing."""
    with tempfile.TemporaryDirectory() as name, torch.inference_mode(False):
        folder = Path(name)
        (folder / "loras").mkdir()
        with current().training(model) as backbone:
            settings = TrainSettings(3, 2, 1e-2, optimizer=options)
            keeping = Keeping(folder / "runs", memory_check=False)
            job = Job(backbone, dataset(folder), lora, settings, Output(folder / "loras", "check", "fp32"), keeping)
            result = finetune(job, Progress())
    return result.state, result.losses


@contextmanager
def attention_without_backward(wrap: Callable[[Any], Any]) -> Iterator[list[int]]:
    """ComfyUI's attention as with --use-sage-attention: a kernel whose output has no gradient; counts its calls."""
    real, calls = (attention.optimized_attention, attention.optimized_attention_masked), []

    def forward_only(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        with torch.no_grad():
            return real[0](*args, **kwargs)

    attention.optimized_attention = attention.optimized_attention_masked = wrap(forward_only)
    try:
        yield calls
    finally:
        attention.optimized_attention, attention.optimized_attention_masked = real


def check_attention_without_backward() -> dict[str, int]:
    """Training computes attention by a kernel that has a backward pass, whatever ComfyUI was started with or a pack has
    put in its place; samples are drawn with that."""
    found = {}
    state, losses, _ = train(network(), PRESETS["light"], steps=2)
    for name, wrap in (("ComfyUI's", attention.wrap_attn), ("a pack's", lambda function: function)):
        with attention_without_backward(wrap) as calls:
            again, repeated, _ = train(network(), PRESETS["light"], steps=2)
            chosen = attention.optimized_attention
        assert repeated == losses and equal(again, state) and calls and chosen is not attention.attention_pytorch
        ups = [value for key, value in again.items() if key.endswith("lora_up.weight")]
        assert ups and all(value.abs().sum() > 0 for value in ups)
        found[name] = len(ups)
    return found


def check_cancel_during_the_estimate() -> dict[str, str]:
    """Cancel while the memory is estimated ends the run."""
    import diff2flow_nodes.training.loop as loops

    real, calls = loops.Loop.loss, []

    def loss(self: Any, micro: Any) -> Any:
        calls.append(micro)
        if len(calls) == 1:
            raise management.InterruptProcessingException()
        return real(self, micro)

    loops.Loop.loss = loss
    try:
        train(network(), PRESETS["light"], memory_check=True)
    except management.InterruptProcessingException:
        assert len(calls) == 1
        return {"ended": "by Cancel"}
    finally:
        loops.Loop.loss = real
    raise AssertionError(f"Cancel was lost: {len(calls)} calls of the network")


def check_text_encoder_counts_in_the_estimate() -> dict[str, float]:
    """With the text encoders trained, the estimate holds their weights and their activations."""
    import diff2flow_nodes.training.finetune as finetuning

    real, seen = finetuning.estimate, []
    finetuning.estimate = lambda *given: seen.append(real(*given)) or seen[-1]
    try:
        train(network(), replace(TEXT, text_encoder=False), steps=1, memory_check=True)
        clip = text_encoder(1)
        train(network(), TEXT, clip=clip, steps=1, memory_check=True)
    finally:
        finetuning.estimate = real
    without, with_text = seen
    size = sum(p.numel() * p.element_size() for p in clip.cond_stage_model.parameters())
    encoder = clip.cond_stage_model.clip_l.transformer
    own = sum(p.numel() * p.element_size() for p in encoder.parameters())
    assert own <= with_text.frozen - without.frozen <= size, (own, size, with_text, without)
    assert with_text.activations > without.activations and with_text.trained > without.trained
    return {"text encoder": own / 2**20}


def check_streamed_weights_of_unknown_source() -> dict[str, str]:
    """A model whose weights are streamed and that cannot be loaded anew is refused in one sentence."""
    model = network()
    if "disable_dynamic" not in model.clone.__code__.co_varnames:
        return {"streaming": "not in this version"}
    model.__class__ = type("Streamed", (type(model),), {"is_dynamic": lambda self: True})
    try:
        with current().training(model):
            pass
    except ValueError as error:
        assert str(error).startswith("model: its weights are streamed") and "Load Checkpoint" in str(error)
        return {"refused": str(error)}
    raise AssertionError("trained")


def check_pairs_after_an_unload() -> dict[str, float]:
    """Pairs are made of the whole network, though the text encoder drove it from the device between two batches."""
    from diff2flow_nodes.hosts.choice import flow_of
    from diff2flow_nodes.training.teacher import Teacher, TeacherSettings

    host, model = current(), network()
    model = host.apply_lora(model, None, kohya_lora(model, 1), 1.0, None)[0]
    context = torch.cat([side[0][0] for side in (conditioning(seed=1), conditioning(seed=2)) for _ in range(2)])
    noise = torch.randn(latent()["samples"].shape, generator=torch.Generator().manual_seed(7))
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]]).expand(4, -1)
    with torch.inference_mode(False), host.training(model) as backbone:
        teacher = Teacher(backbone, flow_of(host.facts(model), "terminal"), TeacherSettings(2, 4.0, "euler"))
        inputs = [noise.clone(), context.clone()]
        first = teacher(*inputs, None, sizes)
        for action in ACTIONS:
            action(model)
            assert torch.equal(teacher(*inputs, None, sizes), first), action.__name__
    return {"std": float(first.std())}


if __name__ == "__main__":
    main(dict(globals()))

"""Networks kept in half precision, as on a card: every preset trains, validates and samples; fp32 is float32."""

import numpy as np
import pytest
import torch
from half_networks import HALF, Products, norms_as_on_cuda
from safetensors.torch import load_file, save_file

from diff2flow_nodes import hosts
from diff2flow_nodes.hosts.headless import HeadlessHost, checkpoint
from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS as NODES
from diff2flow_nodes.tests.depth_pairs import disc_on_slope, write_pairs
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint
from diff2flow_nodes.training.loop import Loop

torch.set_num_threads(1)  # tiny networks: on a busy machine more threads only wait for each other

PRESETS = {
    "light": {"preset": "light"},
    "paper-small": {"preset": "paper-small"},
    "paper-base": {"preset": "paper-base"},
    "full": {"preset": "full"},
    "dora": {"preset": "custom", "conv": True, "dora": True},
    "text": {"preset": "custom", "text_encoder": True},
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A host that keeps half-precision weights as they are on the CPU, too, as it does on a card."""
    place, before = tmp_path_factory.mktemp("half"), list(hosts._chosen)
    made = HeadlessHost(place / "models", place / "input", place / "output")
    wide = make_checkpoint(made.folder("checkpoints") / "float32.safetensors", vae="means")
    for dtype in HALF:
        weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(wide).items()}
        save_file(weights, made.folder("checkpoints") / f"{_name(dtype)}.safetensors")
        same = {k: v.float() for k, v in weights.items()}
        save_file(same, made.folder("checkpoints") / f"{_name(dtype)}_wide.safetensors")
    write_pairs(place / "input" / "pairs", 4, (32, 32))
    hosts.use(made)
    real = checkpoint._build_unet

    def as_on_a_card(unet, layout, name, device):
        kept = unet["input_blocks.0.0.weight"].dtype
        return checkpoint.build_unet(unet, layout, name, kept if kept in HALF else torch.float32)

    checkpoint._build_unet = as_on_a_card
    yield made
    checkpoint._build_unet = real
    hosts._chosen[:] = before


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _run(name, **inputs):
    node = NODES[name]()
    returned = getattr(node, node.FUNCTION)(**inputs)
    return returned["result"] if isinstance(returned, dict) else returned


def _train(host, ckpt, lora, precision="auto", depth=False, watched=True, name="run", **options):
    """Two steps: MODEL, LoRA's name."""
    model, clip, vae = host.load_checkpoint(f"{ckpt}.safetensors")
    pictures = torch.from_numpy(np.stack([disc_on_slope(i, (32, 32))[0] for i in range(4)]) / 255).float()
    if depth:
        data = _run("Diff2FlowDepthDataset", folder="pairs", vae=vae, clip=clip, resolution=32)[0]
    else:
        data = _run("Diff2FlowImages", images=pictures, vae=vae, clip=clip, captions="a cat\na dog\na fox\na hen")[0]
    watch = None
    if watched:
        watch = _run(
            "Diff2FlowTrainWatch", vae=vae, clip=clip, prompts="a cat", sample_every=1, sample_steps="1", cfg=3.0,
            width=32, height=32, seed=0, validate_every=1, held_out_share=0.3, **({"images": pictures} if depth else {}),
        )[0]  # fmt: skip
    trained = _run(
        "Diff2FlowTrain",
        model=model,
        dataset=data,
        lora=_run("Diff2FlowLoraConfig", **{"rank": 4, "alpha": 4.0, **PRESETS[lora]})[0],
        objective="diff2flow",
        steps=2,
        batch_size=2,
        learning_rate=1e-3,
        seed=0,
        output_name=name,
        resume="new",
        save_dtype="fp32",
        optimizer=_run("Diff2FlowOptimizerConfig", precision=precision, **options)[0],
        watch=watch,
        clip=clip,
    )
    return trained[0], trained[1]


@pytest.mark.parametrize(
    ("dtype", "precision", "checkpointing"), [(torch.float16, "bf16", False), (torch.bfloat16, "auto", True)]
)
@pytest.mark.parametrize("lora", PRESETS)
def test_every_preset_trains_validates_and_samples(host, dtype, precision, checkpointing, lora):
    with norms_as_on_cuda():
        model, name = _train(host, _name(dtype), lora, precision, checkpointing=checkpointing)
    folder = "checkpoints" if lora == "full" else "loras"
    assert all(weight.isfinite().all() for weight in load_file(host.folder(folder) / name).values())
    assert model.base.dtype == (torch.float32 if lora == "full" else dtype)


@pytest.mark.parametrize("lora", ["paper-small", "paper-base"])
def test_depth_trains_validates_and_samples(host, lora):
    with norms_as_on_cuda():
        _, name = _train(host, "float16", lora, "bf16", depth=True)
    assert load_file(host.folder("loras") / name)["lora_unet_conv_in.reshape_weight"].tolist()[1] == 8


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lora", ["paper-small", "dora", "text"])
def test_fp32_on_half_weights_is_what_the_same_weights_in_float32_train(host, monkeypatch, dtype, lora):
    run, seen = Loop.run, Products()

    def watched_run(*given):
        with seen:
            run(*given)

    monkeypatch.setattr(Loop, "run", watched_run)
    _, narrow = _train(host, _name(dtype), lora, "fp32", watched=False, name="narrow")
    assert seen.formats == {"torch.float32"}
    _, wide = _train(host, f"{_name(dtype)}_wide", lora, "fp32", watched=False, name="wide")
    narrow, wide = (load_file(host.folder("loras") / name) for name in (narrow, wide))
    assert narrow.keys() == wide.keys() and all(torch.equal(narrow[key], wide[key]) for key in wide)

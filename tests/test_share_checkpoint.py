"""Diff2Flow Save Checkpoint, headless: what is baked loads again as it was, and what cannot be shared is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diff2flow_nodes import hosts
from diff2flow_nodes.files import folder_written_whole, without_writing
from diff2flow_nodes.hosts import HostError, use
from diff2flow_nodes.hosts.choice import choose_flow
from diff2flow_nodes.hosts.headless import HeadlessHost
from diff2flow_nodes.nodes.sharing import Diff2FlowSaveCheckpoint
from diff2flow_nodes.tests import lora_files
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint, run_cli
from diff2flow_nodes.tests.share_loras import METADATA, random_lora

torch.set_num_threads(1)  # tiny networks: on a busy machine more threads only wait for each other
SHAPES = {"SD1": (32, 64), "SD2": (64, 64), "SDXL": (32, 64)}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    place, before = tmp_path_factory.mktemp("share"), list(hosts._chosen)
    made = HeadlessHost(place / "models", place / "input", place / "output")
    make_checkpoint(made.folder("checkpoints") / "SD1.safetensors", markers=("v_pred",), channels=SHAPES["SD1"])
    for family in ("SD2", "SDXL"):
        make_checkpoint(made.folder("checkpoints") / f"{family}.safetensors", family, SHAPES[family])
    use(made)
    yield made
    hosts._chosen[:] = before


@pytest.fixture(scope="module")
def loaded(host):
    return host.load_checkpoint("SD1.safetensors")


def with_lora(host, loaded, strength=0.7, **changes):
    model, clip, vae = loaded
    return *host.apply_lora(model, clip, random_lora(model, clip), strength, {**METADATA, **changes}), vae


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(("family", "dtype"), [("SD1", "fp32"), ("SD1", "fp16"), ("SD2", "fp16"), ("SDXL", "fp16")])
def test_baked_weights_are_base_and_lora(host, family, dtype):
    plain = host.load_checkpoint(f"{family}.safetensors")
    model, clip, vae = with_lora(host, plain)
    (name,) = Diff2FlowSaveCheckpoint().save(model, clip, vae, f"baked/{family}_{dtype}", dtype)["result"]
    assert name == f"baked/{family}_{dtype}.safetensors"
    again, clip_again, _ = host.load_checkpoint(name)
    changed = 0
    for owner, merged, base in (
        (again.base, model.base.weights.merged(model.patches), plain[0].base.weights.module),
        (clip_again, clip.weights.merged(clip.patches), plain[1].weights.module),
    ):
        found, originals = dict(owner.weights.module.named_parameters()), dict(base.named_parameters())
        for key, value in merged.named_parameters():
            tolerance = {"rtol": 1e-3, "atol": 1e-6} if dtype == "fp16" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(found[key], value, **tolerance)
            changed += not torch.equal(value, originals[key])
    assert changed > 10


@pytest.mark.parametrize("family", ["SD1", "SD2", "SDXL"])
def test_every_kind_of_layer_is_baked(host, family):
    """Convolutions, norms and biases of the UNet; embeddings and norms of the text encoders."""
    model, clip, vae = host.load_checkpoint(f"{family}.safetensors")
    network = model.base.weights.module
    conv, norm = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.norm1"
    state = {
        f"lora_unet_{name.replace('.', '_')}.{part}": tensor
        for name, kind in ((conv, "loha"), (norm, "norm"))
        for part, tensor in lora_files.layer(kind, network.get_submodule(name).weight.shape).items()
    }
    state["diffusion_model.out.2.bias.diff"] = torch.ones(4)
    towers = {key: tower.model.config.hidden_size for key, tower in clip.towers.items()}
    for key, width in towers.items():
        start = f"text_encoders.clip_{key}.transformer.text_model."
        state[f"{start}embeddings.position_embedding.diff"] = torch.ones(77, width)
        state |= {
            f"{start}{name}.diff": torch.ones(width) for name in ("final_layer_norm", "encoder.layers.0.layer_norm1")
        }
        state[f"{start}final_layer_norm.diff_b"] = torch.ones(width)
    tuned, tuned_clip = host.apply_lora(model, clip, state, 0.5, METADATA)
    assert len(tuned.patches) == 4 and len(tuned_clip.patches) == 4 * len(towers)
    (name,) = Diff2FlowSaveCheckpoint().save(tuned, tuned_clip, vae, f"kinds_{family}", "fp32")["result"]
    again, clip_again, _ = host.load_checkpoint(name)
    for owner, expected, base in (
        (again.base, tuned.base.weights.merged(tuned.patches), network),
        (clip_again, tuned_clip.weights.merged(tuned_clip.patches), clip.weights.module),
    ):
        found, plain = dict(owner.weights.module.named_parameters()), dict(base.named_parameters())
        changed = {key for key, value in expected.named_parameters() if not torch.equal(value, plain[key])}
        assert len(changed) == (4 if base is network else 4 * len(towers))
        for key, value in expected.named_parameters():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_baked_file_has_the_keys_of_its_base_and_says_what_it_is(host, loaded):
    model, clip, vae = with_lora(host, loaded, **{"diff2flow.start": "noise"})
    (name,) = Diff2FlowSaveCheckpoint().save(model, clip, vae, "flow", "bf16")["result"]
    base, baked = (load_file(host.path("checkpoints", each)) for each in ("SD1.safetensors", name))
    assert set(base) == set(baked) and {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in baked.items()}
    assert all(v.dtype == torch.bfloat16 for v in baked.values() if v.is_floating_point() and v.numel())
    said = metadata_of(host.path("checkpoints", name))
    assert said["modelspec.title"] == "flow" and said["modelspec.architecture"] == "stable-diffusion-v1"
    assert said["modelspec.merged_from"] == "ink" and said["modelspec.usage_hint"] == "4 steps, CFG 1"
    assert said["diff2flow.recommended_steps"] == "4" and said["diff2flow.t_range"] == "0.0640425,1"
    assert json.loads(said["diff2flow.baked"]) == [{"title": "ink", "hash": "abc"}]
    facts = host.facts(host.load_checkpoint(name)[0])
    assert facts.prediction == "v" and choose_flow(facts).start == "noise"
    assert choose_flow(host.facts(loaded[0])).start == "terminal"


def test_nothing_is_overwritten(host, loaded):
    shared = with_lora(host, loaded)
    names = [Diff2FlowSaveCheckpoint().save(*shared, "twice")["result"][0] for _ in range(2)]
    assert names == ["twice.safetensors", "twice_00002.safetensors"]
    assert not list(host.folder("checkpoints").glob(".*"))


def test_a_zero_terminal_snr_lora_leaves_its_marker(host, loaded):
    shared = with_lora(host, loaded, **{"diff2flow.zero_terminal_snr": "true"})
    (name,) = Diff2FlowSaveCheckpoint().save(*shared, "dark")["result"]
    state = load_file(host.path("checkpoints", name))
    assert "ztsnr" in state and "v_pred" in state
    assert host.facts(host.load_checkpoint(name)[0]).schedule.is_zero_terminal_snr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diff2flow.objective": "flow_matching"}, "'ink' was trained by plain flow matching"),
        ({"diff2flow.task": "depth"}, "'ink' makes the network look at an image"),
        ({"modelspec.architecture": "stable-diffusion-v1"}, "no Diff2Flow LoRA on it"),
    ],
)
def test_what_cannot_be_shared_is_refused(host, loaded, changes, message):
    model, clip, vae = with_lora(host, loaded, **changes)
    with pytest.raises(HostError, match=message) as refused:
        Diff2FlowSaveCheckpoint().save(model, clip, vae, "never")
    assert str(refused.value).startswith("Diff2Flow Save Checkpoint: model: ") and "\n" not in str(refused.value)
    assert not list(host.folder("checkpoints").glob("never*"))


def test_a_model_without_lora_is_refused_with_the_way_out(host, loaded):
    for model in (loaded[0], host.apply_lora(loaded[0], None, random_lora(loaded[0]), 0.0, METADATA)[0]):
        with pytest.raises(HostError, match="put Diff2Flow LoRA Loader or Diff2Flow Checkpoint Loader before it"):
            Diff2FlowSaveCheckpoint().save(model, *loaded[1:], "never")


def test_a_text_encoder_that_was_forgotten_is_noticed(host, loaded):
    lora = {"diff2flow.lora": json.dumps({"text_encoder": True})}
    model, clip, vae = with_lora(host, loaded, **lora)
    with pytest.raises(HostError, match="clip: the LoRA 'ink' trained the text encoder too"):
        Diff2FlowSaveCheckpoint().save(model, loaded[1], vae, "never")
    assert Diff2FlowSaveCheckpoint().save(model, clip, vae, "both")["result"] == ("both.safetensors",)


def test_text_encoder_and_autoencoder_come_from_their_own_files(host, loaded):
    make_checkpoint(host.folder("checkpoints") / "kl.safetensors", vae="kl")
    model, clip, _ = with_lora(host, loaded)
    (name,) = Diff2FlowSaveCheckpoint().save(model, clip, host.load_checkpoint("kl.safetensors")[2], "mixed")["result"]
    keys = load_file(host.path("checkpoints", name)).keys()
    assert any("first_stage_model.encoder" in key for key in keys) and not any("taesd" in key for key in keys)
    with pytest.raises(HostError, match="a text encoder of SD2 cannot go into a checkpoint of SD1"):
        Diff2FlowSaveCheckpoint().save(model, host.load_checkpoint("SD2.safetensors")[1], loaded[2], "never")


@pytest.mark.parametrize("name", ["../outside", "/etc/x", "", "a/../b"])
def test_names_stay_in_the_folder(host, name):
    assert "name: the name" in str(Diff2FlowSaveCheckpoint.VALIDATE_INPUTS(name=name))


def test_too_large_for_fp16_says_so_and_leaves_nothing(host, loaded):
    model, clip, vae = loaded
    state = {key: value * 1e6 if key.endswith("up.weight") else value for key, value in random_lora(model).items()}
    model, _ = host.apply_lora(model, None, state, 1.0, METADATA)
    with pytest.raises(HostError, match="not finite in torch.float16; save in bf16 or fp32"):
        Diff2FlowSaveCheckpoint().save(model, clip, vae, "large", "fp16")
    assert not list(host.folder("checkpoints").glob("*large*"))


def test_both_nodes_run_from_a_workflow(host, loaded, tmp_path):
    """They are outputs: nothing has to come behind them; what they wrote is told of."""
    lora, models = random_lora(*loaded[:2]), tmp_path / "models"
    (models / "loras").mkdir(parents=True)
    save_file(lora, str(models / "loras" / "ink.safetensors"), METADATA)
    make_checkpoint(models / "checkpoints" / "base.safetensors", channels=SHAPES["SD1"], vae="means")
    load = {"ckpt_name": "base.safetensors", "lora_name": "ink.safetensors", "lora_strength": 1.0}
    parts = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "name": "flow", "save_dtype": "bf16"}
    workflow = {
        "1": {"class_type": "Diff2FlowCheckpointLoader", "inputs": load},
        "2": {"class_type": "Diff2FlowSaveCheckpoint", "inputs": parts},
        "3": {"class_type": "Diff2FlowExportDiffusers", "inputs": parts},
    }
    done = run_cli(tmp_path, workflow)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = {models / "checkpoints" / "flow.safetensors", tmp_path / "output" / "diffusers" / "flow"}
    assert {Path(line) for line in done.stdout.splitlines()} == wanted
    assert (tmp_path / "output" / "diffusers" / "flow" / "model_index.json").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder_written_whole(tmp_path / "half") as folder:
        (folder / "part.txt").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with folder_written_whole(tmp_path / "whole") as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["whole", "unet", "config.json"]
    assert (tmp_path / "whole" / "unet").stat().st_mode & 0o500 == 0o500
    with pytest.raises(ValueError, match="'whole' exists already"), folder_written_whole(tmp_path / "whole"):
        pass
    with without_writing(), folder_written_whole(tmp_path / "other") as folder:
        (folder / "x").write_text("x")
    assert not (tmp_path / "other").exists()

"""LoRA files: metadata, names that are never overwritten, and clear errors for what is none."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, tiny_job
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.layers import PRESETS, LoraSettings
from diff2flow_nodes.training.loop import NonFiniteError
from diff2flow_nodes.training.lora_file import free_path, load_lora, read_metadata, save_lora
from diff2flow_nodes.training.objective import ObjectiveSettings
from diff2flow_nodes.training.product import Output

STATE = {
    "lora_unet_mid.lora_down.weight": torch.ones(2, 4),
    "lora_unet_mid.lora_up.weight": torch.ones(4, 2),
    "lora_unet_mid.alpha": torch.tensor(2.0),
}


def _finetune(tmp_path, backbone=None, lora=None, name="style", progress=None, **settings):
    values = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, **settings}
    job = tiny_job(tmp_path, backbone, lora, name=name, keeping={"resume": "new"}, **values)
    return finetune(job, progress or SilentProgress())


def test_the_file_holds_the_returned_tensors_and_metadata(tmp_path):
    progress = SilentProgress()
    result = _finetune(tmp_path, progress=progress)
    state, metadata = load_lora(tmp_path / "loras" / result.name)
    assert result.name == "style.safetensors" and progress.closed
    assert state.keys() == result.state.keys() and all(torch.equal(state[k], result.state[k]) for k in state)
    assert metadata == result.metadata == read_metadata(tmp_path / "loras" / result.name)
    assert len(result.losses) == 3
    assert [f.name for f in (tmp_path / "loras").iterdir()] == ["style.safetensors"]


def test_metadata(tmp_path):
    m = _finetune(tmp_path, objective=ObjectiveSettings(t_range="full"), seed=9).metadata
    expected = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "style",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "32x32",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_base_model_version": "sd_v1",
        "ss_learning_rate": "0.001",
        "ss_num_train_images": "3",
        "ss_max_train_steps": "3",
        "ss_steps": "3",
        "ss_seed": "9",
        "ss_sd_model_name": "tiny.safetensors",
        "diff2flow.version": "1",
        "diff2flow.objective": "diff2flow",
        "diff2flow.prediction": "eps",
        "diff2flow.schedule": "scaled_linear(1000, 0.00085, 0.012)",
        "diff2flow.zero_terminal_snr": "false",
        "diff2flow.start": "noise",
        "diff2flow.t_range": "0,1",
        "diff2flow.recommended_steps": "12",
        "diff2flow.recommended_cfg": "4.5",
        "diff2flow.base_hash": "ab" * 32,
    }
    assert {key: m.get(key) for key in expected} == expected
    assert json.loads(m["ss_tag_frequency"])["drawings"]["a drawing"] == 3
    assert "3 images" in m["diff2flow.dataset"]
    assert all(isinstance(value, str) for value in m.values())


def test_a_base_that_is_unknown_is_not_named(tmp_path, caplog):
    """Empty names and hashes would be read as names and hashes."""
    backbone = TinyBackbone()
    metadata = finetune(tiny_job(tmp_path / "known", backbone, steps=1), SilentProgress()).metadata
    named = {key for key in metadata if "base_name" in key or "base_hash" in key or "sd_model" in key}
    assert len(named) == 5 and not [line for line in caplog.messages if "which base" in line]
    backbone.base_name = backbone.base_hash = ""
    metadata = finetune(tiny_job(tmp_path / "unknown", backbone, steps=1), SilentProgress()).metadata
    assert not named & set(metadata)
    assert len([line for line in caplog.messages if "which base" in line and "Checkpoint Loader" in line]) == 1


def test_metadata_counts_what_is_trained_and_tells_the_files_alpha(tmp_path):
    backbone = TinyBackbone()
    total = sum(p.numel() for p in backbone.module.parameters())
    lora = LoraSettings(rank=4, alpha=3.0, rslora=True, dora=True, exclude=("*attn2*",))
    result = _finetune(tmp_path, backbone, lora, steps=1)
    m, trained = result.metadata, int(result.metadata["diff2flow.trained_parameters"])
    weights = [t for key, t in result.state.items() if not key.endswith(".alpha")]
    assert trained == sum(t.numel() for t in weights)
    assert float(m["diff2flow.trained_share"]) == pytest.approx(trained / total, rel=1e-5)
    assert m["ss_network_alpha"] == "6" and json.loads(m["ss_network_args"])["dora_wd"] == "True"
    assert {float(t) for key, t in result.state.items() if key.endswith(".alpha")} == {6.0}
    assert json.loads(m["diff2flow.lora"])["exclude"] == ["*attn2*"]


def test_a_native_range_starts_at_the_terminal(tmp_path):
    m = _finetune(tmp_path).metadata
    assert m["diff2flow.start"] == "terminal" and m["diff2flow.t_range"] == "0.06404246,0.9716595"


@pytest.mark.parametrize("family", ["SD1", "SD2", "SDXL"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_every_family_has_metadata(tmp_path, family, prediction):
    backbone = TinyBackbone(prediction)
    backbone.family = family
    m = _finetune(tmp_path, backbone, PRESETS["paper-base"], steps=1).metadata
    assert m["modelspec.architecture"].endswith("/lora") and m["ss_network_dim"] == "Dynamic"
    assert json.loads(m["ss_network_args"])["conv_dim"] == "Dynamic"


def test_the_hash_is_that_of_the_tensors(tmp_path):
    metadata = save_lora(tmp_path / "a.safetensors", STATE, {"note": "one"})
    content = (tmp_path / "a.safetensors").read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_an_existing_file_is_never_overwritten(tmp_path):
    names = [_finetune(tmp_path, name="deep/ink", steps=1).name for _ in range(3)]
    assert names == ["deep/ink.safetensors", "deep/ink_00002.safetensors", "deep/ink_00003.safetensors"]
    assert free_path(tmp_path, "ink.safetensors").name == "ink.safetensors"


@pytest.mark.parametrize("name", ["../out", "/etc/lora", "a/../../b", "", " ", "a/", 'a"b'])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="output_name: the name"):
        Output(tmp_path, name)


def test_an_interrupted_run_says_how_far_it_came(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _finetune(tmp_path, progress=SilentProgress(2, KeyboardInterrupt()))
    _, metadata = load_lora(tmp_path / "loras" / "style.safetensors")
    assert metadata["ss_steps"] == "2" and metadata["ss_max_train_steps"] == "3"


def test_a_failure_names_the_file_that_was_saved(tmp_path):
    class Exploding(TinyBackbone):
        def __call__(self, *args):
            return super().__call__(*args) * (float("nan") if len(self.batch_sizes) > 3 else 1.0)

    with pytest.raises(ValueError, match="at step 3 of 3.*2 steps are saved as 'style.safetensors'") as caught:
        _finetune(tmp_path, Exploding())
    assert isinstance(caught.value, NonFiniteError)
    assert read_metadata(tmp_path / "loras" / "style.safetensors")["ss_steps"] == "2"


def test_what_is_no_lora_is_named(tmp_path):
    save_lora(tmp_path / "good.safetensors", STATE, {})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "good.safetensors").read_bytes()[:-8])
    (tmp_path / "text.safetensors").write_text("hello, this is no file of tensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"model.diffusion_model.out.2.weight": torch.ones(1)}, tmp_path / "checkpoint.safetensors")
    for name in ("cut", "text", "empty", "missing"):
        with pytest.raises(ValueError, match=f"'{name}.safetensors' cannot be read"):
            load_lora(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="'checkpoint.safetensors' is no LoRA"):
        load_lora(tmp_path / "checkpoint.safetensors")


def test_an_unknown_dtype_is_named(tmp_path):
    with pytest.raises(ValueError, match="save_dtype"):
        Output(tmp_path, "a", dtype="int8")

"""What each kind of LoRA file does to a weight, against the papers' formulas in numpy, and how files spell it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from diff2flow_nodes.hosts import HostError
from diff2flow_nodes.hosts.lora_fit import Target, fitting
from diff2flow_nodes.tests import lora_files
from diff2flow_nodes.training.lora_keys import is_lora, read_keys
from diff2flow_nodes.training.lora_kinds import changes, without_middle_of_lokr

ALPHA_OVER_RANK = 2.0 / lora_files.RANK
SQUARE, WIDE, CONV = (32, 32), (32, 16), (32, 16, 3, 3)


def patched(kind, shape, strength=1.0):
    """The weight, and what the file's layer makes of it, with its tensors; all as numpy."""
    parts = lora_files.layer(kind, shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    changed = changes(parts)["weight"].apply(weight, strength)
    return weight.numpy(), changed.numpy(), {name: part.double().numpy() for name, part in parts.items()}


def assert_adds(kind, shape, delta):
    for strength in (1.0, -0.5):
        weight, changed, parts = patched(kind, shape, strength)
        np.testing.assert_allclose(changed, weight + strength * delta(parts).reshape(shape), rtol=1e-4, atol=1e-5)


def flat(array):
    return array.reshape(len(array), -1)


@pytest.mark.parametrize("shape", [WIDE, CONV])
def test_lora(shape):
    product = lambda p: flat(p["lora_up.weight"]) @ flat(p["lora_down.weight"])  # noqa: E731
    assert_adds("lora", shape, lambda p: ALPHA_OVER_RANK * product(p))
    assert_adds("lora no alpha", shape, product)


def test_lora_with_a_middle_is_three_convolutions_in_a_row():
    """down 1×1, middle k×k, up 1×1."""
    weight, changed, p = patched("lora middle", CONV)
    image = torch.randn(2, 16, 8, 8, dtype=torch.double)
    down, middle, up = (torch.from_numpy(p[f"lora_{name}.weight"]) for name in ("down", "mid", "up"))
    conv = torch.nn.functional.conv2d
    expected = ALPHA_OVER_RANK * conv(conv(conv(image, down), middle, padding=1), up)
    found = conv(image, torch.from_numpy(changed - weight).double(), padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [WIDE, CONV])
def test_loha(shape):
    product = lambda p: (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])  # noqa: E731
    assert_adds("loha", shape, lambda p: ALPHA_OVER_RANK * product(p))
    assert_adds("loha no alpha", shape, product)


def middle(a, b, t):
    """Sum over both ranks of a[i, o] t[i, j, k, l] b[j, n]."""
    return np.einsum("io,ijkl,jn->onkl", a, t, b)


def test_loha_with_middles():
    halves = lambda p: [middle(p[f"hada_w{i}_a"], p[f"hada_w{i}_b"], p[f"hada_t{i}"]) for i in (1, 2)]  # noqa: E731
    assert_adds("loha middle", CONV, lambda p: ALPHA_OVER_RANK * np.multiply(*halves(p)))


def blockwise(first, second):
    """The Kronecker product written out: the block (i, j) is first[i, j] · second."""
    return np.concatenate([np.concatenate([value * second for value in row], axis=1) for row in first])


def test_lokr():
    assert_adds("lokr", WIDE, lambda p: blockwise(p["lokr_w1"], p["lokr_w2"]))  # alpha has no rank to count against
    assert_adds("lokr", CONV, lambda p: blockwise(p["lokr_w1"], p["lokr_w2"]))
    second = lambda p: p["lokr_w2_a"] @ p["lokr_w2_b"]  # noqa: E731
    assert_adds("lokr both", WIDE, lambda p: ALPHA_OVER_RANK * blockwise(p["lokr_w1"], second(p)))
    first = lambda p: p["lokr_w1_a"] @ p["lokr_w1_b"]  # noqa: E731
    assert_adds("lokr no alpha", WIDE, lambda p: blockwise(first(p), second(p)))
    assert_adds("lokr first", WIDE, lambda p: 2.0 / 2 * blockwise(first(p), p["lokr_w2"]))


def test_lokr_with_a_middle_in_either_form():
    product = lambda p: middle(p["lokr_w2_a"], p["lokr_w2_b"], p["lokr_t2"])  # noqa: E731
    assert_adds("lokr middle", CONV, lambda p: ALPHA_OVER_RANK * blockwise(p["lokr_w1"], product(p)))
    parts, weight = lora_files.layer("lokr middle", CONV), torch.randn(CONV)
    plain = without_middle_of_lokr(parts)
    assert "lokr_t2" not in plain
    both = [changes(each)["weight"].apply(weight, 0.5) for each in (parts, plain)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize(("kind", "shape"), [("glora", WIDE), ("glora older", SQUARE), ("glora older", WIDE)])
def test_glora_depends_on_the_weight(kind, shape):
    weight, changed, p = patched(kind, shape, 0.5)
    a1, a2, b1, b2 = (p[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    delta = weight @ a2 @ a1 + b2 @ b1 if "older" in kind else weight @ a1 @ a2 + b1 @ b2
    np.testing.assert_allclose(changed, weight + 0.5 * ALPHA_OVER_RANK * delta, rtol=1e-4, atol=1e-5)


def test_oft_turns_the_outputs():
    """An orthogonal matrix for each block of outputs: Cayley's, by its definition."""
    weight, changed, p = patched("oft no alpha", WIDE)
    for i, block in enumerate(p["oft_blocks"]):
        skew, one, rows = block - block.T, np.eye(8), slice(8 * i, 8 * i + 8)
        turned = (one + skew) @ np.linalg.inv(one - skew)
        np.testing.assert_allclose(turned @ turned.T, one, atol=1e-9)
        np.testing.assert_allclose(changed[rows], turned.T @ weight[rows], rtol=1e-4, atol=1e-5)


def test_alpha_of_oft_bounds_how_far():
    parts, weight = lora_files.layer("oft", WIDE), torch.randn(WIDE)
    near = changes({**parts, "alpha": torch.tensor(0.01)})["weight"].apply(weight, 1.0)
    assert 0 < (near - weight).norm() < 0.02 * weight.norm()


def test_boft_is_orthogonal_and_mixes_farther_than_a_block():
    parts, weight = lora_files.layer("boft", SQUARE), torch.eye(32)
    turned = changes({**parts, "alpha": torch.tensor(0.0)})["weight"].apply(weight, 1.0)
    torch.testing.assert_close(turned @ turned.T, torch.eye(32), rtol=1e-4, atol=1e-4)
    assert turned[:8, 16:].abs().max() > 1e-2


def test_whole_tensors():
    assert_adds("diff", WIDE, lambda p: p["diff"])
    assert_adds("norm", (32,), lambda p: p["w_norm"])
    for strength in (1.0, 0.3):
        _, changed, p = patched("set", WIDE, strength)
        np.testing.assert_allclose(changed, p["set_weight"], rtol=1e-6)
    bias = changes(lora_files.layer("norm", (32,)))["bias"]
    torch.testing.assert_close(bias.apply(torch.zeros(32), 0.5), 0.5 * bias.parts["diff"])


@pytest.mark.parametrize("kind", ["lora dora", "loha dora", "lokr dora"])
def test_every_kind_of_product_may_be_a_dora(kind):
    weight, changed, p = patched(kind, WIDE)
    _, plain, _ = patched(kind.removesuffix(" dora") + (" both" if "lokr" in kind else ""), WIDE)
    if kind != "lokr dora":  # its random numbers are drawn in another order
        expected = p["dora_scale"] * plain / np.linalg.norm(weight, axis=1, keepdims=True)
        np.testing.assert_allclose(changed, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(changed - weight).max() > 0.1


# spellings


@pytest.mark.parametrize("endings", lora_files.ENDINGS)
def test_every_spelling_is_the_same_layer(endings):
    ldm = "middle_block.1.transformer_blocks.0.attn1.to_out.0"
    diffusers = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    same = {"lora_unet_" + name.replace(".", "_") for name in (ldm, diffusers)} | {f"diffusion_model.{ldm}"}
    for name in lora_files.names(ldm, diffusers):
        state = lora_files.spelled(name, WIDE, endings)
        [(layer, parts)] = read_keys(state).layers.items()
        assert layer in same and set(parts) == {"lora_down.weight", "lora_up.weight"}, name
        assert is_lora(state)


def test_names_of_text_encoders_stay():
    for name in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"):
        assert list(read_keys({f"{name}.lora_linear_layer.up.weight": torch.ones(1)}).layers) == [name]


# what cannot be applied


LAYER = "lora_unet_mid_block_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
TARGET = Target({LAYER: WIDE}, "SD1", has_clip=False)


def named(layer, parts):
    return {f"{layer}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("kind", lora_files.LINEAR)
@pytest.mark.parametrize("shape", [(40, 16), (32, 24)])
def test_another_shape_is_refused(kind, shape):
    parts = lora_files.layer(kind, shape)
    parts.pop("diff_b", None)
    with pytest.raises(HostError, match="made for another base model than this SD1 model"):
        fitting(named(LAYER, parts), Target({LAYER: (64, 48)}, "SD1", has_clip=False))


def test_whole_tensors_need_the_very_shape():
    """ComfyUI's loader merges no difference of another shape, though of as many values."""
    with pytest.raises(HostError, match=r"shape \(32, 16\) where the model has \(32, 16, 1, 1\)"):
        fitting({f"{LAYER}.diff": torch.ones(WIDE)}, Target({LAYER: (*WIDE, 1, 1)}, "SD1", has_clip=False))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({f"{LAYER}.on_input": torch.ones(1), f"{LAYER}.weight": torch.ones(1)}, r"IA3 \(1 tensors\)"),
        (lora_files.spelled("unet.conv_in", WIDE, (".lora_A.weight", ".lora_B.weight"))
         | {"unet.conv_in.lora_magnitude_vector": torch.ones(32)}, "DoRA as PEFT writes it"),
        ({f"{LAYER}.lora_up.weight": torch.ones(32, 2)}, "lacks lora_down.weight"),
        ({f"{LAYER}.lora_down.weight": torch.ones(2, 16)}, "lacks lora_up.weight"),
        ({f"{LAYER}.hada_w1_a": torch.ones(32, 2)}, "lacks hada_w1_b and hada_w2_a and hada_w2_b"),
        ({f"{LAYER}.lokr_w1_a": torch.ones(32, 2)}, "lacks lokr_w1_b and lokr_w2_a and lokr_w2_b"),
        (named(LAYER, lora_files.layer("loha", WIDE) | lora_files.layer("lora", WIDE)), "LoRA and LoHa at once"),
        (named(LAYER, lora_files.layer("oft", WIDE) | {"rescale": torch.ones(32, 1)}), "OFT with a rescale"),
        (named(LAYER, lora_files.layer("oft", WIDE) | {"dora_scale": torch.ones(32, 1)}), "OFT with a dora_scale"),
        ({f"{LAYER}.oft_blocks": torch.ones(3, 4, 8, 8)}, "BOFT without alpha"),
        ({f"{LAYER}.alpha": torch.ones(1)}, "no LoRA of a kind that is known here"),
        (lora_files.spelled("unet.conv_in", WIDE, (".lora_A.weight", ".lora_B.weight"))
         | lora_files.spelled("conv_in", WIDE, (".lora_down.weight", ".lora_up.weight")), "twice, in two spellings"),
        (named(TEXT, lora_files.layer("loha", WIDE)), r"changes the text encoder only \(1 layers.*Checkpoint Loader"),
        (named("lora_unet_nowhere", lora_files.layer("loha", WIDE)), "none of the LoRA's 1 layers.*another base model"),
    ],
)  # fmt: skip
def test_refused_by_name(state, words):
    with pytest.raises(HostError, match=words) as error:
        fitting(state, TARGET)
    assert "text encoder" not in words or "another base" not in str(error.value)


def test_what_is_left_out_is_said_once(caplog):
    here = named(LAYER, lora_files.layer("loha", WIDE))
    text = {k: t for i in range(264) for k, t in named(f"{TEXT}_{i}", lora_files.layer("lora", WIDE)).items()}
    away = {k: t for i in range(5) for k, t in named(f"lora_unet_no_{i}", lora_files.layer("lora", WIDE)).items()}
    with caplog.at_level(logging.INFO):
        found = fitting(here | text | away | {"extra": torch.ones(1)}, TARGET)
    assert list(found.changes) == [LAYER] and {key.split(".")[0] for key in found.state} == {LAYER}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("264 of the LoRA's 270 layers belong to the text encoder") and "LoraLoader" in lines[0]
    assert lines[1].startswith("5 of the LoRA's 270 layers are left out, since this SD1 model has no such layers")
    assert lines[1].endswith("'lora_unet_no_0', 'lora_unet_no_1', 'lora_unet_no_2' …")
    assert lines[2] == "1 keys of the LoRA change nothing and are left out: 'extra'"


def test_a_whole_file_leaves_nothing_to_say(caplog):
    with caplog.at_level(logging.INFO):
        fitting(named(LAYER, lora_files.layer("lokr", WIDE)), TARGET)
    assert not caplog.records

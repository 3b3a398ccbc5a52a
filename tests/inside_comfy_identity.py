"""Checks inside ComfyUI's own process of what identifies cached and continued work: it differs where results do.

Run as `inside_comfy.py` is.
"""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inside_comfy import kohya_lora, main, network, run_node, text_encoder
from inside_comfy_training import autoencoder

# isort: split
import comfy.hooks
import comfy.sd
import torch
from safetensors.torch import save_file

from diff2flow_nodes.hosts import current

EXTRAS = {
    "CLIPAttentionMultiply": "attention_multiply", "FreeU_V2": "freelunch", "ModelMergeSimple": "model_merging",
    "RescaleCFG": "model_advanced", "SetClipHooks": "hooks", "UNetCrossAttentionMultiply": "attention_multiply",
}  # fmt: skip


def extra(name: str, *args: Any) -> Any:
    """First output of a stock node of ComfyUI's extras, whichever API version it is written for."""
    cls = getattr(importlib.import_module(f"comfy_extras.nodes_{EXTRAS[name]}"), name)
    if hasattr(cls, "define_schema"):
        return cls.execute(*args).result[0]
    return getattr(cls(), cls.FUNCTION)(*args)[0]


def inversion(folder: Path, name: str, values: torch.Tensor | None) -> None:
    """The file of a textual inversion, with other values; None takes it away."""
    path = folder / f"{name}.safetensors"
    path.unlink(missing_ok=True)
    if values is not None:
        save_file({"emb_params": values.clone()}, path)


def reading(clip: Any, folder: str) -> Any:
    """The CLIP, with a folder of textual inversions."""
    clip.tokenizer.clip_l.embedding_directory = [folder]
    return clip


def with_layer(clip: Any, layer: int) -> Any:
    return run_node("CLIPSetLastLayer", clip, layer)[0]


GOLDEN = {
    "CLIP": "d2245416bc70ad076b85ef98f8a0f2a67ead6a352cf971771717e6712f22064c",
    "SD1": "55579ac5a2181683d0025d8f1ee1ea570248c49989beb5a6e53b050db1a3082f",
    "SDXL": "458f240c2e3765d9df619713176f0c12fc0a604790ca2d539f712bb5179bdcd2",
}
"""Identities as they were when they were digests of weights and patches alone."""


def check_identity_of_defaults() -> dict[str, str]:
    """Where nothing is set, caches, pairs and runs of versions that knew weights alone are found again."""
    host = current()
    found = {"CLIP": text_encoder(), "SD1": network(), "SDXL": network("SDXL", stored=torch.float16)}
    found = {name: str(host.fingerprint(thing)) for name, thing in found.items()}
    assert found == GOLDEN, found
    return found


def check_identity_of_a_text_encoder() -> dict[str, Any]:
    """It differs exactly where CLIPTextEncode's encoding does."""
    host, clip = current(), text_encoder()
    encoded = {}

    def told(name: str, other: Any) -> None:
        encoded[name] = (run_node("CLIPTextEncode", other, "a cat")[0][0][0], host.fingerprint(other))

    told("plain", clip)
    for layer in (-1, -2, -3, -12):  # ComfyUI takes the last of 3 layers for -12
        told(f"layer {layer}", with_layer(clip, layer))
    told("scaled attention", extra("CLIPAttentionMultiply", clip, 1.2, 1.0, 1.0, 1.0))
    told("other scale", extra("CLIPAttentionMultiply", clip, 1.4, 1.0, 1.0, 1.0))
    for strength in (0.5, 1.0):
        told(f"hook {strength}", hooked(clip, strength))
    replaced = clip.clone()
    original, factor = replaced.encode_from_tokens_scheduled, 2.0
    replaced.encode_from_tokens_scheduled = lambda tokens: [[factor * c, p] for c, p in original(tokens)]
    told("replaced method", replaced)
    for a, b in itertools.combinations(encoded, 2):
        same = encoded[a][0].shape == encoded[b][0].shape and torch.equal(encoded[a][0], encoded[b][0])
        assert same == (encoded[a][1] == encoded[b][1]), (a, b, same)
    padded = clip.clone()
    padded.set_tokenizer_option("clip_l_min_padding", 3)
    assert host.fingerprint(padded).settings == {"tokenizer options": '{"clip_l_min_padding": 3}'}
    assert encoded["layer -2"][1].settings == {"clip skip": "-2"} and not encoded["layer -1"][1].settings
    return {name: identity.settings for name, (_, identity) in encoded.items()}


def hooked(clip: Any, strength: float) -> Any:
    """The CLIP with a LoRA that is on by a hook."""
    weight = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    change = torch.ones_like(clip.cond_stage_model.state_dict()[weight]) * 0.01
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=strength)
    hook.weights_clip, hook.weights, hook.need_weight_init = {weight: ("diff", (change,))}, {}, False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return extra("SetClipHooks", clip, False, True, group)


def check_identity_of_a_network() -> dict[str, Any]:
    """It differs exactly where the network does that training and the teacher of reflow call."""
    host, model = current(), network()
    generator = torch.Generator().manual_seed(6)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 768, generator=generator)
    outputs = {}

    def told(name: str, other: Any) -> None:
        with torch.inference_mode(False), torch.no_grad(), host.training(other) as backbone:
            made = backbone(x.clone(), torch.tensor([10.0, 700.0]), {"context": context.clone()})
            outputs[name] = (made.detach(), host.fingerprint(other))

    told("plain", model)
    told("sampling patch", extra("FreeU_V2", model, 1.3, 1.4, 0.9, 0.2))
    told("rescaled guidance", extra("RescaleCFG", model, 0.7))
    lora = kohya_lora(model, 1)
    told("lora", host.apply_lora(model, None, dict(lora), 1.0, None)[0])
    told(
        "other alpha",
        host.apply_lora(model, None, {k: v * 3 if k.endswith("alpha") else v for k, v in lora.items()}, 1.0, None)[0],
    )
    told("scaled attention", extra("UNetCrossAttentionMultiply", model, 1.3, 1.0, 1.0, 1.0))
    for strength in (0.3, 0.6):
        tuned = host.apply_lora(model, None, dict(lora), strength, None)[0]
        told(f"merged {strength}", extra("ModelMergeSimple", model, tuned, 0.0))
    convolution = model.clone()
    first = torch.nn.Conv2d(4, 64, 3, padding=1)
    convolution.add_object_patch("diffusion_model.input_blocks.0.0", first)
    told("replaced layer", convolution)
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):
        told("bypass", comfy.sd.load_bypass_lora_for_models(model, None, dict(lora), 0.7, 0.0)[0])
        told("bypass again", comfy.sd.load_bypass_lora_for_models(model, None, dict(lora), 0.7, 0.0)[0])
        told("bypass weaker", comfy.sd.load_bypass_lora_for_models(model, None, dict(lora), 0.4, 0.0)[0])
    for a, b in itertools.combinations(outputs, 2):
        same = torch.equal(outputs[a][0], outputs[b][0])
        assert same == (outputs[a][1] == outputs[b][1]), (a, b, same)
    return {name: identity.settings for name, (_, identity) in outputs.items()}


def check_captions_are_letters() -> dict[str, Any]:
    """Brackets in captions are encoded as ComfyUI encodes escaped ones; as weights where that is asked for."""
    clip = text_encoder()
    captions = ("saber (fate)", "saber \\(fate\\)", "((a)) (b:1.4)", "plain")
    wanted = ("saber \\(fate\\)", "saber \\(fate\\)", "\\(\\(a\\)\\) \\(b:1.4\\)", "plain")
    with cached("letters") as name:
        for weighted, texts in ((False, wanted), (True, captions)):
            made = images(clip, captions, name, weighted)
            for i, text in enumerate(texts):
                expected = run_node("CLIPTextEncode", clip, text)[0][0][0]
                assert torch.equal(made.batch([i]).context, expected.clone()), (weighted, captions[i])
    return {"captions": len(captions)}


@contextmanager
def cached(name: str) -> Iterator[str]:
    """Name of a folder of datasets that is empty, and gone afterwards."""
    folder = f"{name}_check_{os.getpid()}"
    try:
        yield folder
    finally:
        shutil.rmtree(current().folder("datasets") / folder, ignore_errors=True)


def images(clip: Any, captions: Sequence[str], name: str, weighted: bool = False) -> Any:
    """The dataset of a few grey pictures."""

    pictures = torch.linspace(0, 1, len(captions))[:, None, None, None].expand(-1, 16, 16, 3)
    lines = "\n".join(captions)
    with torch.inference_mode(False):
        return run_node(
            "Diff2FlowImages", pictures, lines, autoencoder(), clip, None, 1, False, name, None, 0.0, weighted
        )[0]


def check_texts_follow_the_clip_and_its_files() -> dict[str, Any]:
    """Texts of a dataset are those of its CLIP as it is set now, and of the textual inversions that there are now."""
    captions, identities = ("a cat", "embedding:d2f_check, a cat", "a dog"), []

    def fresh(made: Any, other: Any) -> list[bool]:
        contexts = [run_node("CLIPTextEncode", other, caption)[0][0][0].clone() for caption in captions]
        return [torch.equal(made.batch([i]).context, context) for i, context in enumerate(contexts)]

    with cached("texts") as name, tempfile.TemporaryDirectory() as folder:
        clip = reading(text_encoder(), folder)
        for layer in (-1, -2):
            other = with_layer(clip, layer)
            made = images(other, captions, name)
            assert fresh(made, other) == [True] * 3, layer
            identities.append(made.identity())
        for seed in (None, 1, 2, None):
            values = None if seed is None else torch.randn(2, 768, generator=torch.Generator().manual_seed(seed))
            inversion(Path(folder), "d2f_check", values)
            made = images(clip, captions, name)
            assert fresh(made, clip) == [True] * 3, seed
            identities.append(made.identity())
    assert identities[0] == identities[2] == identities[5] and len(set(identities)) == 4, identities
    return {"identities": len(set(identities))}


def check_trained_text_is_that_of_the_clip() -> dict[str, int]:
    """The encoders that are trained begin with what CLIPTextEncode gives at the layer that is set."""
    model, clip = network(), text_encoder()
    contexts = []
    for layer in (-1, -2, -12):
        skipped = with_layer(clip, layer)
        expected = run_node("CLIPTextEncode", skipped, "a cat")[0][0][0]
        with torch.inference_mode(False), current().training(model, skipped) as backbone:
            context = backbone.text.encode(["a cat"])[0].detach()
        assert torch.allclose(context, expected.clone(), atol=1e-5), layer
        contexts.append(context)
    assert not torch.allclose(contexts[0], contexts[1], atol=1e-2)
    return {"layers": len(contexts)}


def check_pairs_of_another_clip() -> dict[str, str]:
    """Pairs are not mixed: another layer of the text encoder, another file of a textual inversion; both are named."""
    model, said = network(), []

    with cached("pairs") as name, tempfile.TemporaryDirectory() as folder:
        clip = reading(text_encoder(), folder)

        def make(other: Any, count: int) -> None:
            inputs = (model, other, "embedding:d2f_pairs a fox", count, 2, 1.0, 0, name, None, "", "", 64, 64)
            run_node("Diff2FlowReflowPairs", *inputs)

        inversion(Path(folder), "d2f_pairs", torch.ones(1, 768))
        skipped = with_layer(clip, -2)
        make(skipped, 2)
        make(skipped, 3)
        for other, values in ((clip, torch.ones(1, 768)), (skipped, -torch.ones(1, 768))):
            inversion(Path(folder), "d2f_pairs", values)
            try:
                make(other, 4)
            except ValueError as error:
                said.append(str(error))
    assert len(said) == 2 and "clip skip: -2 there, -1 here" in said[0] and "embedding:d2f_pairs: " in said[1], said
    return {"refused": said}


if __name__ == "__main__":
    main(dict(globals()))

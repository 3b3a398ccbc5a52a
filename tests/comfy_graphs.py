"""API-format graphs for the tests that run in both hosts."""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def base(checkpoint: str, prompt: str = "a handwritten (three:1.2)", batch: int = 2) -> Graph:
    """Checkpoint, prompts and empty latents: nodes ckpt, positive, negative, latent."""
    return {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "positive": node("CLIPTextEncode", text=prompt, clip=["ckpt", 1]),
        "negative": node("CLIPTextEncode", text="blurred", clip=["ckpt", 1]),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=batch),
    }


def saved(graph: Graph, samples: str, prefix: str) -> Graph:
    """The graph with VAEDecode and SaveImage behind the node `samples`; the saving node has the prefix's name."""
    decode = node("VAEDecode", samples=[samples, 0], vae=["ckpt", 2])
    return {
        **graph,
        f"{prefix}_decode": decode,
        prefix: node("SaveImage", images=[f"{prefix}_decode", 0], filename_prefix=prefix),
    }


def diff2flow(model: list[Any], steps: int = 4, latent: str = "latent", **changes: Any) -> dict[str, Any]:
    """A Diff2FlowSampler node."""
    inputs = {"seed": 5, "steps": steps, "cfg": 3.0, "solver": "euler", "denoise": 1.0, "start": "auto", **changes}
    return node(
        "Diff2FlowSampler",
        model=model,
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=[latent, 0],
        **inputs,
    )


def ksampler(model: list[Any], steps: int = 8, latent: str = "latent", **changes: Any) -> dict[str, Any]:
    """A stock KSampler node."""
    inputs = {
        "seed": 5,
        "steps": steps,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        **changes,
    }
    return node(
        "KSampler", model=model, positive=["positive", 0], negative=["negative", 0], latent_image=[latent, 0], **inputs
    )


def stock_flow(graph: Graph, model: list[Any], name: str, steps: int = 4, cfg: float = 3.0) -> Graph:
    """The graph with stock SamplerCustom (node `name`) on Diff2FlowSigmas and the stock euler."""
    sampler = node(
        "SamplerCustom", model=model, add_noise=True, noise_seed=5, cfg=cfg, positive=["positive", 0],
        negative=["negative", 0], sampler=[f"{name}_euler", 0], sigmas=[f"{name}_sigmas", 0],
        latent_image=["latent", 0],
    )  # fmt: skip
    return {
        **graph,
        f"{name}_euler": node("KSamplerSelect", sampler_name="euler"),
        f"{name}_sigmas": node("Diff2FlowSigmas", model=model, steps=steps, shape="uniform", denoise=1.0),
        name: sampler,
    }


def training(graph: Graph, folder: str, output_name: str, steps: int = 3, **changes: Any) -> Graph:
    """The graph with dataset, LoRA config and the node `train`."""
    inputs = {"objective": "diff2flow", "steps": steps, "batch_size": 4, "learning_rate": 0.0005, "seed": 0, **changes}
    return {
        **graph,
        "dataset": node("Diff2FlowImageDataset", folder=folder, vae=["ckpt", 2], clip=["ckpt", 1], resolution=64),
        "lora": node("Diff2FlowLoraConfig", preset="light", rank=16, alpha=16.0),
        "train": node(
            "Diff2FlowTrain",
            model=["ckpt", 0],
            dataset=["dataset", 0],
            lora=["lora", 0],
            output_name=output_name,
            **inputs,
        ),
    }


def reflow(graph: Graph, recipe: dict[str, Any], output_name: str, **changes: Any) -> Graph:
    """The graph with pairs, recipe, LoRA config and the node `train`."""
    inputs = {"objective": "diff2flow", "steps": 3, "batch_size": 2, "learning_rate": 0.0005, "seed": 0, **changes}
    return {
        **graph,
        "pairs": node(
            "Diff2FlowReflowPairs", model=["ckpt", 0], clip=["ckpt", 1], prompts="a handwritten three\na red {bar|dot}",
            count=4, steps=4, cfg=3.0, seed=0, folder="pairs", negative="blurred", width=64, height=64,
        ),
        "recipe": node("Diff2FlowReflowRecipe", **recipe),
        "lora": node("Diff2FlowLoraConfig", preset="light", rank=16, alpha=16.0),
        "train": node(
            "Diff2FlowTrain", model=["ckpt", 0], dataset=["pairs", 0], lora=["lora", 0], loss=["recipe", 0],
            output_name=output_name, **inputs,
        ),
    }  # fmt: skip


def sdxl(checkpoint: str, lora: str) -> Graph:
    """SDXL through stock and own samplers, prompts of both kinds and a LoRA: images stock, sized, ours and tuned."""
    graph = base(checkpoint)
    sizes = {"width": 1024, "height": 768, "crop_w": 32, "crop_h": 8, "target_width": 512, "target_height": 640}
    texts = {"text_g": "a (large:1.3) field " + "of yellow flowers, " * 20, "text_l": "a field"}
    graph["sized_positive"] = node("CLIPTextEncodeSDXL", clip=["ckpt", 1], **sizes, **texts)
    graph["lora"] = node(
        "LoraLoader", model=["ckpt", 0], clip=["ckpt", 1], lora_name=lora, strength_model=1.0, strength_clip=0.8
    )
    graph["tuned_positive"] = node("CLIPTextEncode", text="a handwritten (three:1.2)", clip=["lora", 1])
    graph["stock_sample"] = ksampler(["ckpt", 0], steps=3)
    graph["sized_sample"] = ksampler(["ckpt", 0], steps=3)
    graph["sized_sample"]["inputs"]["positive"] = ["sized_positive", 0]
    graph["ours_sample"] = diff2flow(["ckpt", 0], steps=3)
    graph["tuned_sample"] = ksampler(["lora", 0], steps=3)
    graph["tuned_sample"]["inputs"]["positive"] = ["tuned_positive", 0]
    for name in ("stock", "sized", "ours", "tuned"):
        graph = saved(graph, f"{name}_sample", name)
    return graph

"""What the templates say: their groups from left to right, a note on top of each, and which nodes are in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """A group of nodes on the page.

    Args:
        title: on the group.
        note: Markdown on top of it: what to change and press.
        nodes: titles of the nodes, as in the API graph.
    """

    title: str
    note: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """A template: its groups, and the nodes whose seed the page draws anew after every run."""

    groups: tuple[Group, ...]
    drawn_anew: tuple[str, ...] = ()


_CHECKPOINT = (
    "Choose your Stable Diffusion 1.5 checkpoint in `ckpt_name`. It is only read; what is trained becomes a LoRA."
)
_LEARNING = (
    "Press **Run**; the LoRA lands in `models/loras` under `output_name`. **Cancel** saves as well, and the next Run"
    " goes on from there: raise `steps` to learn more."
)
_SAME_SEEDS = "Both pictures have the same seeds and prompt, so that what changed comes from the training."

TEMPLATES: dict[str, Template] = {
    "few_steps": Template(
        (
            Group(
                "1. Your checkpoint and its LoRA",
                "Choose the checkpoint in `ckpt_name` and a LoRA that was reflowed on it in `lora_name`; the template"
                " *reflow* makes one. Steps and CFG come from the LoRA itself.",
                ("Checkpoint", "LoRA"),
            ),
            Group(
                "2. Your prompt",
                "Write your prompt into *Positive* and press **Run**. The negative prompt counts only above CFG 1.",
                ("Positive", "Negative", "Size and batch"),
            ),
            Group(
                "3. An image in few steps",
                "Every Run draws another image; set `control_after_generate` to fixed to keep one. To use other steps"
                " or CFG than the LoRA's, cut the link and type your own.",
                ("Sample", "Decode", "Save image"),
            ),
            Group(
                "4. How many steps are enough?",
                "One noise in 1, 2, 4 and 8 steps, side by side. Delete this group once you know.",
                ("How many steps", "Save steps"),
            ),
            Group(
                "5. The same in ComfyUI's own KSampler",
                "*Diff2Flow Model* makes the model one for any stock sampler: keep `euler` and `simple`. Delete this"
                " group if you do not need it.",
                ("As a flow model", "ComfyUI's own sampler", "Decode its image", "Save its image"),
            ),
        ),
        drawn_anew=("Sample",),
    ),
    "finetune_and_sample": Template(
        (
            Group("1. Your checkpoint", _CHECKPOINT, ("Checkpoint",)),
            Group(
                "2. Your images",
                "Put 10 to 100 images into a folder inside ComfyUI's `input` folder and write its name into `folder`;"
                " the caption of ink.png is ink.txt beside it. `trigger` is the word that calls your style.",
                ("Images and captions",),
            ),
            Group(
                "3. Training",
                f"{_LEARNING} Write a prompt of your own into *Watch*: it is drawn every 100 steps.",
                ("What is trained", "How it learns", "Watch", "Train", "Save loss plot"),
            ),
            Group(
                "4. Before and after",
                f"Write a prompt with your trigger word into *Positive*. {_SAME_SEEDS}",
                ("Positive", "Negative", "Size and batch", "Before", "After", "Save before", "Save after"),
            ),
            Group(
                "5. Images with the new LoRA",
                "Later, load the LoRA in *Diff2Flow LoRA Loader*, or in ComfyUI's own, and leave the training out."
                " Change `seed` and press **Run** for other images.",
                ("Sample", "Decode", "Save images"),
            ),
        )
    ),
    "reflow": Template(
        (
            Group("1. Your checkpoint", _CHECKPOINT, ("Checkpoint",)),
            Group(
                "2. Pairs: the model makes its own training material",
                "Write prompts like those that you will use; `{red|blue}` stands for one of the two. This takes the"
                " longest: 1000 pairs are a try, 10000 and more are in earnest; what is made is kept, and a larger"
                " `count` goes on.",
                ("Pairs of noise and image",),
            ),
            Group(
                "3. Training",
                f"{_LEARNING} *Watch* draws 1 and 4 steps while it learns.",
                ("Recipe", "What is trained", "How it learns", "Watch", "Train"),
            ),
            Group(
                "4. The same noise, before and after",
                "Before with the teacher's CFG, after with CFG 1, which needs half the work a step. Change the prompt"
                " in *Positive*.",
                ("Positive", "Negative", "Size and batch", "Before", "After", "Save before", "Save after"),
            ),
            Group(
                "5. How straight the paths are",
                "Both plots have one meaning: the lower the curve, the fewer steps are enough. Delete this group if you"
                " only want the LoRA; the template *few_steps* uses it.",
                ("How straight, before", "How straight, after", "Save plot before", "Save plot after"),
            ),
        )
    ),
    "depth_estimation": Template(
        (
            Group(
                "1. Your checkpoint and its depth LoRA",
                "Choose the checkpoint in `ckpt_name` and a depth LoRA that was trained on it in `lora_name`; the"
                " template *depth_training* makes one.",
                ("Checkpoint", "Depth LoRA"),
            ),
            Group(
                "2. Your image",
                "Choose or drop an image of any size and press **Run**. A video's frames can be connected instead.",
                ("Image",),
            ),
            Group(
                "3. Its depth",
                "`ensemble` merges several estimates: 1 is fastest, 4 to 10 are steadier. `polarity` near_white is what"
                " depth ControlNets want.",
                ("Depth",),
            ),
            Group(
                "4. Keep it",
                "The picture is for looking at and for ControlNet. The EXR file keeps the depth itself, every bit.",
                ("Save depth picture", "Save raw depth"),
            ),
        )
    ),
    "depth_training": Template(
        (
            Group("1. Your checkpoint", _CHECKPOINT, ("Checkpoint",)),
            Group(
                "2. Images with their true depth",
                "Write the name of a folder inside ComfyUI's `input` folder into `folder`: images/a.png with"
                " depth/a.exr (or npy, or 16-bit png). Hypersim and Virtual KITTI 2 are read as they are unpacked.",
                ("Images and depth",),
            ),
            Group(
                "3. Training",
                f"{_LEARNING} A tenth of the pairs is kept out of it to validate on, every 100 steps.",
                ("What is trained", "How it learns", "Watch", "Train", "Save loss"),
            ),
        )
    ),
    "resolution_adaptation": Template(
        (
            Group("1. Your checkpoint", _CHECKPOINT, ("Checkpoint",)),
            Group(
                "2. Images for the new size",
                "Write the name of a folder with varied images inside ComfyUI's `input` folder into `folder`, and the"
                " new size into `resolution`. The same size belongs into *Watch* and *Size and batch*.",
                ("Images and captions",),
            ),
            Group(
                "3. Training",
                _LEARNING,
                ("What is trained", "How it learns", "Watch", "Train", "Save loss plot"),
            ),
            Group(
                "4. The new size, before and after",
                f"Change the prompt in *Positive*. {_SAME_SEEDS}",
                ("Positive", "Negative", "Size and batch", "Before", "After", "Save before", "Save after"),
            ),
        )
    ),
    "black_white": Template(
        (
            Group("1. Your checkpoint", _CHECKPOINT, ("Checkpoint",)),
            Group(
                "2. Your images, and black and white ones",
                "Write the name of a folder inside ComfyUI's `input` folder into `folder`: your images keep the rest of"
                " the model as it is. `repeats` weighs the black and the white one; about half as many as you have"
                " images is good.",
                ("Images and captions", "Black", "White", "Black images", "White images"),
            ),
            Group(
                "3. Training from pure noise on",
                f"{_LEARNING} `t_range` full in *Loss* is what repairs black and white: leave it.",
                ("What is trained", "Loss", "How it learns", "Watch", "Train", "Save loss plot"),
            ),
            Group(
                "4. Before and after",
                "Change the two prompts to dark and bright ones of your own. Sample the LoRA in Diff2Flow nodes: they"
                " know that it begins at pure noise.",
                (
                    *("Black prompt", "White prompt", "Negative", "Size and batch"),
                    *("Black before", "White before", "Black after", "White after"),
                    *("Save black before", "Save white before", "Save black after", "Save white after"),
                ),
            ),
        )
    ),
}
"""By the name of the API graph."""

"""A step of kohya's sd-scripts as `train_network.py` makes it, with latents and texts that are cached:

    python -m diff2flow_nodes.bench.peers.kohya FOLDER_OF_SD_SCRIPTS

Its own UNet, made as small as the others', its own LoRA network on linear and convolution layers, its `process_batch`,
optimizer and learning rate; around them the calls of its loop in their order, without the progress bar and the log.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from .worker import BATCH, CONFIG, RANK, RATE, SIDE, serve, texts


def main() -> None:
    """Serves it."""
    sys.path.insert(0, sys.argv[1])
    import library.original_unet as unets
    import networks.lora
    import train_network
    from accelerate import Accelerator

    words = ["--learning_rate", str(RATE), "--optimizer_type", "AdamW", "--max_grad_norm", "1.0"]
    args = train_network.setup_parser().parse_args([*words, "--lr_scheduler", "constant"])
    trainer, accelerator = train_network.NetworkTrainer(), Accelerator()
    trainer.vae_scale_factor = 0.18215
    unet = small_unet(unets)

    def run(steps: int) -> None:
        args.max_train_steps = steps
        network = networks.lora.create_network(1.0, RANK, RANK, None, [], unet, conv_dim=RANK, conv_alpha=RANK)
        network.apply_to([], unet, False, True)
        _train(train_network, trainer, accelerator, args, unet, network, steps)

    serve(lambda steps: _restoring(unet, lambda: run(steps)))


def small_unet(unets: Any) -> torch.nn.Module:
    """Its UNet in the size of the others'; frozen."""
    sizes = {
        "BLOCK_OUT_CHANNELS": CONFIG["block_out_channels"],
        "LAYERS_PER_BLOCK": CONFIG["layers_per_block"],
        "LAYERS_PER_BLOCK_UP": CONFIG["layers_per_block"] + 1,
        "DOWN_BLOCK_TYPES": list(CONFIG["down_block_types"]),
        "UP_BLOCK_TYPES": list(CONFIG["up_block_types"]),
    }
    torch.manual_seed(0)
    with patch.multiple(unets, **sizes):
        unet = unets.UNet2DConditionModel(
            sample_size=SIDE, attention_head_dim=CONFIG["attention_head_dim"],
            cross_attention_dim=CONFIG["cross_attention_dim"],
        )  # fmt: skip
    unet.set_use_sdpa(True)
    return unet.requires_grad_(False)


def _train(module: Any, trainer: Any, accelerator: Any, args: Any, unet: Any, network: Any, steps: int) -> None:
    """The calls of its loop."""
    network.prepare_grad_etc(None, None)
    groups, _ = network.prepare_optimizer_params(None, RATE, RATE)
    _, _, optimizer = module.train_util.get_optimizer(args, groups)
    schedule = module.train_util.get_scheduler_fix(args, optimizer, 1)
    network, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    scheduler = trainer.get_noise_scheduler(args, accelerator.device)
    batch = {
        "latents": 5.0 * torch.randn(BATCH, 4, SIDE, SIDE),
        "text_encoder_outputs_list": [texts()],
        "loss_weights": torch.ones(BATCH),
    }
    network.on_epoch_start(None, unet)
    for _ in range(steps):
        with accelerator.accumulate(network):
            loss = trainer.process_batch(
                batch, [], unet, network, None, scheduler, torch.float32, torch.float32, accelerator, args, None, None,
                is_train=True, train_text_encoder=False, train_unet=True,
            )  # fmt: skip
            accelerator.backward(loss)
            trainer.all_reduce_network(accelerator, network)
            accelerator.clip_grad_norm_(network.get_trainable_params(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        loss.detach().item()


def _restoring(unet: torch.nn.Module, run: Callable[[], None]) -> None:
    """Runs it, and takes its LoRA out of the UNet's layers, whose forward it replaces."""
    try:
        run()
    finally:
        for module in unet.modules():
            vars(module).pop("forward", None)


if __name__ == "__main__":
    main()

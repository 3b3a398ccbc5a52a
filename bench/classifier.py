"""A small, seeded convolutional network that reads digits: labels for accuracy, features for Fréchet distances."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import digits

FEATURES = 64
_EPOCHS, _BATCH, _RATE = 30, 64, 4e-3


class Classifier(nn.Module):
    """Reads 8x8 digits, white on black. `features` is what its last layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 16, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, len(digits.WORDS))

    def forward(self, small: Tensor) -> Tensor:
        """Logits (B, 10) of digits (B, 8, 8) in [0, 1]."""
        return self.head(self.body(small[:, None]))


def classify(pictures: Tensor) -> Tensor:
    """Labels (B,) of pictures (B, H, W, 3) in [0, 1], in any colours."""
    with torch.no_grad():
        return trained()(shrunk(pictures)).argmax(dim=1)


def features(pictures: Tensor) -> Tensor:
    """Features (B, 64) of pictures (B, H, W, 3) in [0, 1], in any colours."""
    with torch.no_grad():
        return trained().body(shrunk(pictures)[:, None])


def shrunk(pictures: Tensor) -> Tensor:
    """Digits (B, 8, 8), white on black from 0 to 1, of pictures (B, H, W, 3) in [0, 1]; corners are paper."""
    small = F.interpolate(pictures.float().movedim(-1, 1), size=(8, 8), mode="area")
    grey = small.mean(dim=1)
    low, high = grey.amin(dim=(1, 2), keepdim=True), grey.amax(dim=(1, 2), keepdim=True)
    grey = (grey - low) / (high - low).clamp_min(1e-3)
    paper = grey[:, ::7, ::7].mean(dim=(1, 2), keepdim=True)
    return torch.where(paper > 0.5, 1.0 - grey, grey)


@lru_cache(maxsize=1)
def trained(seed: int = 0) -> Classifier:
    """The network, trained in seconds on the digits that are not held out, moved and slanted a little."""
    images, labels = digits.split(held_out=False)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        network = Classifier()
        optimizer = torch.optim.Adam(network.parameters())
        steps = _EPOCHS * (len(labels) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(0, len(labels), (_BATCH,))
            loss = F.cross_entropy(network(_moved(images[chosen])), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.requires_grad_(False).eval()


def _moved(images: Tensor) -> Tensor:
    """Digits (B, 8, 8) turned, slanted, moved and blurred at random, and scaled to span 0 to 1 as `shrunk` does."""
    count = len(images)
    spread = torch.tensor([[0.05, 0.15, 0.08], [0.05, 0.05, 0.06]])
    move = torch.eye(2, 3).repeat(count, 1, 1) + torch.randn(count, 2, 3) * spread
    grid = F.affine_grid(move, [count, 1, 8, 8], align_corners=False)
    moved = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    moved = moved.pow(torch.empty(count, 1, 1).uniform_(0.6, 1.4)) + 0.03 * torch.randn(count, 8, 8)
    low, high = moved.amin(dim=(1, 2), keepdim=True), moved.amax(dim=(1, 2), keepdim=True)
    return (moved - low) / (high - low).clamp_min(1e-3)

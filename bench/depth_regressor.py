"""A plain convolutional network that is told the depth of pictures: what one gets without a prior, for scale."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

_WIDTHS = (32, 64, 128)
_RATE = 2e-3
_FLIP = 0.5


class Regressor(nn.Module):
    """A small U-Net: pictures (B, 3, H, W) in [0, 1] to normalised log depth (B, H, W); sides are multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        first, *_, last = _WIDTHS
        self.enter = _block(3, first)
        self.down = nn.ModuleList([_block(a, b) for a, b in zip(_WIDTHS, (*_WIDTHS[1:], last), strict=True)])
        self.up = nn.ModuleList([_block(2 * a if i else last + a, a) for i, a in enumerate(reversed(_WIDTHS))])
        self.narrow = nn.ModuleList([nn.Conv2d(a, b, 1) for a, b in zip(_WIDTHS[:0:-1], _WIDTHS[-2::-1], strict=True)])
        self.leave = nn.Conv2d(first, 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Depth (B, H, W)."""
        x, kept = self.enter(pictures), []
        for block in self.down:
            kept.append(x)
            x = block(nn.functional.avg_pool2d(x, 2))
        for i, block in enumerate(self.up):
            x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), kept.pop()], dim=1))
            x = self.narrow[i](x) if i < len(self.narrow) else x
        return self.leave(x)[:, 0]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU(),
    )  # fmt: skip


def trained_regressor(
    pictures: Tensor, depth: Tensor, seconds: float, batch_size: int, seed: int
) -> Callable[[Tensor], Tensor]:
    """A network trained by the absolute error for a time; a function of pictures (B, H, W, 3) to depth (B, H, W).

    The learning rate falls as a cosine over the time; half of the pictures are mirrored.

    Args:
        pictures: (N, H, W, 3) in [0, 1].
        depth: (N, H, W), normalised log depth.
        seconds: of training.
        batch_size: pictures a step.
        seed: of weights and order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Regressor()
    random, optimizer = torch.Generator().manual_seed(seed), torch.optim.AdamW(network.parameters(), lr=_RATE)
    x, began = pictures.movedim(-1, 1).contiguous(), time.monotonic()
    while (part := (time.monotonic() - began) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * 0.5 * (1.0 + torch.cos(torch.tensor(part * torch.pi)).item())
        chosen = torch.randint(0, len(x), (batch_size,), generator=random)
        seen, wanted = x[chosen], depth[chosen]
        if torch.rand((), generator=random) < _FLIP:
            seen, wanted = seen.flip(-1), wanted.flip(-1)
        loss = (network(seen) - wanted).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()

    @torch.no_grad()
    def estimate(given: Tensor) -> Tensor:
        return torch.cat([network(part) for part in given.movedim(-1, 1).split(batch_size)])

    return estimate

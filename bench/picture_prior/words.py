"""The text: a trained row for each token, as narrow as it is learned and as the CLIP-L that a checkpoint holds.

CLIP's twelve layers add nothing here (their last matrices are zero), so that its output is the final layer norm of
token + position. Rows are learned in few dimensions, e, and written as e P with a fixed P whose rows are orthogonal,
equally long and of mean 0: then the layer norm of e P is (e / sqrt(mean(e²) + 1e-5)) P, and what a network computes
from one it computes from the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...hosts.headless.tokens import END, START
from .. import text_weights
from . import captions

SIZE = 128
"""Dimensions of a row as it is learned."""
CLIP_SIZE = 768
LENGTH = captions.MOST_TOKENS + 2
"""Tokens that are computed with: start mark, 22 of the text, and an end mark for all the places behind them."""
END_PLACE = 1
"""Of the end mark among the rows."""
_EPS = 1e-5
_SEED = 0
_STRANGE = 0.7
"""How far the row of a token that is never learned lies from the end mark's, in units of its length."""
_SILENT = ("self_attn.out_proj.weight", "mlp.fc2.weight")
_PREFIX = "transformer.text_model."


class Words(nn.Module):
    """Contexts of captions.

    Args:
        tokens: the ids that have a row of their own; the start and end marks have one besides.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        ids = torch.tensor([START, END, *(token for token in tokens if token not in (START, END))])
        self.register_buffer("tokens", ids)
        random = torch.Generator().manual_seed(_SEED)
        self.rows = nn.Parameter(torch.randn(len(ids), SIZE, generator=random))
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH - 1, SIZE, generator=random))
        self._places = {int(token): place for place, token in enumerate(ids)}

    def forward(self, ids: Tensor) -> Tensor:
        """Context (B, 24, 128) of token ids (B, 24)."""
        places = self.places(ids)
        known = bool((places >= 0).all())
        return self._normed(self.rows[places.to(self.rows.device)] if known else self.table()[ids])

    def places(self, ids: Tensor) -> Tensor:
        """Of token ids (…) among the rows; -1 where one has none."""
        found = torch.tensor([self._places.get(token, -1) for token in ids.flatten().tolist()])
        return found.reshape(ids.shape)

    def of_places(self, places: Tensor) -> Tensor:
        """Context (B, 24, 128) of rows (B, 24), as a matrix product: its backward waits for nothing on a card."""
        chosen = places[..., None] == torch.arange(len(self.rows), device=places.device)
        return self._normed(chosen.to(self.rows.dtype) @ self.rows)

    def _normed(self, rows: Tensor) -> Tensor:
        embedding = rows + nn.functional.pad(self.positions, (0, 0, 0, 1))
        return embedding * (embedding.square().mean(dim=-1, keepdim=True) + _EPS).rsqrt()

    @torch.no_grad()
    def table(self) -> Tensor:
        """(49408, 128), the rows of all tokens.

        One that is never learned has a row near the end mark's, each another: it says little, but can be learned later.
        """
        random = torch.Generator().manual_seed(_SEED)
        end = self.rows[END_PLACE]
        strange = torch.randn(text_weights.VOCABULARY, SIZE, generator=random).to(end) * end.square().mean().sqrt()
        table = end + _STRANGE * strange
        table[self.tokens] = self.rows
        return table


def repeats() -> Tensor:
    """(24,): how many of CLIP's 77 places each computed one stands for."""
    counts = torch.ones(LENGTH)
    counts[-1] = text_weights.POSITIONS - LENGTH + 1
    return counts


def projection() -> Tensor:
    """P, (128, 768): P Pᵀ = 768/128 · identity, and each row's mean is 0."""
    random = torch.Generator().manual_seed(_SEED)
    directions = torch.randn(CLIP_SIZE, SIZE, generator=random, dtype=torch.float64)
    basis, _ = torch.linalg.qr(directions - directions.mean(dim=0))
    return (basis.T * (CLIP_SIZE / SIZE) ** 0.5).float()


def widened_reader(weight: Tensor) -> Tensor:
    """The (outputs, 768) matrix that reads the wide context as an (outputs, 128) one reads the narrow context."""
    return weight @ projection() * (SIZE / CLIP_SIZE)


def clip_l(words: Words, seed: int = _SEED) -> dict[str, Tensor]:
    """CLIP-L's text encoder, float16, of random weights but for the rows and the silent layers."""
    state = text_weights.clip_l(seed)
    for key, value in state.items():
        if key.endswith(_SILENT):
            value.zero_()
    directions = projection()
    positions = torch.zeros(text_weights.POSITIONS, SIZE)
    positions[: LENGTH - 1] = words.positions.detach().float().cpu()
    for name, value in (("token", words.table().float().cpu()), ("position", positions)):
        state[f"{_PREFIX}embeddings.{name}_embedding.weight"] = (value @ directions).half()
    return state

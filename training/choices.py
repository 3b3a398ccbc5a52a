"""What can be chosen by name where the code that acts on it is needed for nothing else before a node runs."""

from __future__ import annotations

import torch

ALPHAS = ("white", "mask")
"""What an image's transparency is: laid on white, or a weight of the loss as well."""
DAMAGED = ("skip", "refuse")
"""What happens to shards of pairs that cannot be read."""
PAIR_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Of what is trained or baked, in files."""
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
"""Of the matrix products while training."""
RESUME = ("auto", "new")

"""Which noise each item of a batch is trained with: as it was drawn, or by minibatch optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

from ..alignment.precision import exact

PAIRINGS = ("independent", "optimal_transport")


def transported(x_data: Tensor, x_noise: Tensor) -> Tensor:
    """The same noises (B, *dims) in the order pi that minimises sum_i |x_data_i - x_noise_pi(i)|².

    Exact minibatch optimal transport (Tong et al. 2023, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772).
    The squared norms are the same in every order, so that the sum of the products is maximised; a scale or a shift of
    x_data changes nothing.

    Args:
        x_data, x_noise: (B, *dims), on any device.

    Raises:
        ValueError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ValueError(
            "pairing 'optimal_transport' needs the package 'scipy': run 'pip install scipy' in ComfyUI's python and"
            " restart, or choose pairing 'independent'"
        ) from error
    products = exact(x_data.detach().flatten(1)) @ exact(x_noise.flatten(1)).T
    _, order = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return x_noise[torch.from_numpy(order).to(x_noise.device)]

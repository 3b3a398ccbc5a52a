"""All stages, in the order of the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .stage import Stage
from .stages import (
    black_white,
    both_hosts,
    depth_sizes,
    exactness,
    fractional,
    growth_data,
    growth_sampling,
    growth_training,
    heavy,
    pairing,
    priors,
    sizes,
    startup,
    text_binding,
)

STAGES: tuple[Stage, ...] = (
    *priors.STAGES,
    exactness.STAGE,
    *heavy.COST,
    both_hosts.STAGE,
    startup.STAGE,
    growth_sampling.STAGE,
    growth_training.STAGE,
    *growth_data.STAGES,
    *heavy.CLAIMS,
    depth_sizes.STAGE,
    black_white.STAGE,
    text_binding.STAGE,
    sizes.STAGE,
    fractional.STAGE,
    pairing.STAGE,
)


def chosen(names: Iterable[str], stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """Stages by their names, with all that they need; all for none.

    Args:
        names: of stages.
        stages: to choose from.

    Raises:
        ValueError: an unknown name.
    """
    known = {stage.name: stage for stage in stages}
    wanted, queue = set(), list(names) or list(known)
    while queue:
        name = queue.pop()
        if name not in known:
            raise ValueError(f"there is no stage {name!r}; the stages are {', '.join(known)}")
        if name not in wanted:
            wanted.add(name)
            queue += known[name].needs
    return [stage for stage in stages if stage.name in wanted]

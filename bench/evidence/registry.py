"""All stages, in the order of the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .stage import Stage
from .stages import adaptation, exactness, fractional, growth_data, growth_sampling, heavy, priors, sizes, startup

STAGES: tuple[Stage, ...] = (
    *priors.STAGES,
    exactness.STAGE,
    *heavy.COST,
    startup.STAGE,
    growth_sampling.STAGE,
    *growth_data.STAGES,
    *adaptation.STAGES,
    *heavy.CLAIMS,
    sizes.STAGE,
    fractional.STAGE,
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

"""Time grids and ODE solvers over any velocity. torch; torchdiffeq for dopri5 only."""

from .grids import SHAPES, shift_time, time_grid, u_shaped
from .solvers import Counted, evaluations, integrate
from .steps import SOLVERS, NonFiniteStateError

__all__ = [
    "SHAPES",
    "SOLVERS",
    "Counted",
    "NonFiniteStateError",
    "evaluations",
    "integrate",
    "shift_time",
    "time_grid",
    "u_shaped",
]

"""Diffusion time and flow time: schedules, the maps between them, and the velocity. torch only."""

from .alignment import Alignment
from .naive import NaiveFlow
from .schedule import NoiseSchedule

__all__ = ["Alignment", "NaiveFlow", "NoiseSchedule"]

"""Diffusion time and flow time: schedules, the maps between them, and the velocity. torch only."""

from .alignment import Alignment
from .schedule import NoiseSchedule

__all__ = ["Alignment", "NoiseSchedule"]

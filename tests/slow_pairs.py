"""Makes pairs slowly, to be killed: prints when the first step began. Run with a folder and the promised seconds."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from diff2flow_nodes.tests.reflow_fakes import make, maker
from diff2flow_nodes.tests.training_fakes import TinyBackbone
from diff2flow_nodes.training import reflow, shards
from diff2flow_nodes.training.teacher import TeacherSettings

SHORT = 2.0
"""A promise that a test has the time to wait for."""


class Slow(TinyBackbone):
    """A pair takes a fortieth of the promise."""

    def __init__(self, promise: float) -> None:
        super().__init__()
        self._pause, self._began = promise / 40 / 20, False

    def __call__(self, x_diff: Any, tau: Any, conditioning: Any) -> Any:
        if not self._began:
            print(time.time(), flush=True)
            self._began = True
        time.sleep(self._pause * len(x_diff) / 2)
        return super().__call__(x_diff, tau, conditioning)


if __name__ == "__main__":
    promise = float(sys.argv[2])
    part = promise / shards.LOST_AT_MOST
    shards.LOST_AT_MOST, shards._WRITING = promise, shards._WRITING * part
    reflow._BATCH_SECONDS *= part
    make(Path(sys.argv[1]), 10_000, by=maker(Slow(promise)), batch_size=64, teacher=TeacherSettings(20, 2.0))

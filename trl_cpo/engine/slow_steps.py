"""A word about steps that take far longer than others."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class SlowSteps(TrainerCallback):
    """Warns once, when a training step takes more than three times the median of the steps before it.

    On a GPU that is often a kernel planned or compiled anew for a batch's shape, which no other figure shows.

    Args:
        clock: gives seconds.
    """

    TIMES = 3
    #: Steps before the first verdict, the first ones being slow by themselves, and steps that the median is of.
    FIRST, KEPT = 20, 100

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start: float | None = None
        self._seen: deque[float] = deque(maxlen=self.KEPT)
        self._told = False

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = self._clock()

    def on_step_end(self, args, state, control, **kwargs):
        if self._start is None or self._told:
            return
        seconds = self._clock() - self._start
        if len(self._seen) >= self.FIRST and seconds > self.TIMES * (usual := statistics.median(self._seen)):
            self._told = True
            logger.warning(
                "Step %d took %.2f s, %.1f times the median of the last %d (%.2f s). Usual causes are kernels planned or "
                "compiled anew for a shape, far longer pairs (see tokens_per_step), and other work on the device. Later slow "
                "steps are not reported.",
                state.global_step,
                seconds,
                seconds / usual,
                len(self._seen),
                usual,
            )
        self._seen.append(seconds)

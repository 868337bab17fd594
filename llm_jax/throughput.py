"""How fast a run is: tokens a second, and the share of the devices' peak that it uses (MFU)."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable

import jax

from llm_jax.scaling.hardware import chip_of_kind

WINDOW_STEPS = 50  # that the current speed is taken over


def peak_flops(device: jax.Device) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device; None where it is not known, as for every CPU."""
    chip = chip_of_kind(device.device_kind)
    return None if chip is None else chip.device_flops


class Throughput:
    """Tokens a second, and the share of the devices' peak that they need (MFU).

    Time counts from `start` or `resume` to `pause`, so compilation, evaluations and checkpoints
    stay outside. `read` looks at the last `WINDOW_STEPS` steps, the averages at all.

    MFU = tokens/s × FLOPs a token / (devices × peak) (Chowdhery et al. 2022, PaLM, appendix B).

    Args:
      devices: how many devices share the work, over all processes.
      clock: seconds that never run backwards.
    """

    def __init__(self, devices: int, clock: Callable[[], float] = time.monotonic):
        self._devices, self._clock = devices, clock
        self._mark: float | None = None  # when the current step's time began; None: paused
        self._paused_share = 0.0  # seconds of the current step before a pause
        self._window: collections.deque[tuple[int, float]] = collections.deque(maxlen=WINDOW_STEPS)
        self._flops_per_token: float | None = None
        self._peak: float | None = None
        self._tokens, self._seconds, self._flops = 0, 0.0, 0.0

    def start(self, flops_per_token: float | None, peak: float | None) -> None:
        """A new stretch of equal steps begins, such as a phase, and with it a new window.

        Args:
          flops_per_token: of forward and backward pass; None if not known.
          peak: FLOP/s of one device; None if not known.
        """
        self._flops_per_token, self._peak = flops_per_token, peak
        self._window.clear()
        self._paused_share = 0.0
        self._mark = self._clock()

    def tick(self, tokens: int) -> None:
        """A step of `tokens` tokens, over all processes, has ended."""
        seconds = self._paused_share
        if self._mark is not None:
            now = self._clock()
            seconds += now - self._mark
            self._mark = now
        self._paused_share = 0.0
        self._window.append((tokens, seconds))
        self._tokens += tokens
        self._seconds += seconds
        self._flops += tokens * (self._flops_per_token or 0)

    def pause(self) -> None:
        """Stops the clock; the device should have finished its steps."""
        if self._mark is not None:
            self._paused_share += self._clock() - self._mark
            self._mark = None

    def resume(self) -> None:
        self._mark = self._clock()

    def read(self) -> dict[str, float]:
        """`tokens_per_second` and `mfu` over the window; what is not known is absent."""
        tokens = sum(tokens for tokens, _ in self._window)
        seconds = sum(seconds for _, seconds in self._window)
        if not seconds:
            return {}
        speed = {"tokens_per_second": tokens / seconds}
        if self._flops_per_token and self._peak:
            speed["mfu"] = speed["tokens_per_second"] * self._flops_per_token / self._total_peak()
        return speed

    def average(self) -> float | None:
        """Tokens a second over all measured steps, or None before the first."""
        return self._tokens / self._seconds if self._seconds else None

    def average_mfu(self) -> float | None:
        """MFU over all measured steps, or None where it is not known."""
        if not (self._seconds and self._flops and self._peak):
            return None
        return self._flops / self._seconds / self._total_peak()

    def _total_peak(self) -> float:
        return self._devices * (self._peak or math.nan)

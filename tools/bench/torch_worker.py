"""The worker of `tools.bench train` for the torch reference; runs in an interpreter with torch."""

from __future__ import annotations

import itertools
import time
from typing import Any

from tools.bench.protocol import (
    Note,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    serve,
)

WARMUP_STEPS = 2


class _Training:
    """The reference's step, made by `start`, in turns."""

    def start(self, note: Note, arguments: list[str]) -> dict[str, Any]:
        """Makes and compiles the step; `arguments` are those of torch_llama.py."""
        del note
        import torch
        import transformers

        from tools.bench import torch_llama

        self.before = resident_bytes()
        settings = torch_llama.parse(arguments)
        self.device = settings.device
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.step = torch_llama.make_step(settings)
        begin = time.perf_counter()
        self.step()
        seconds = time.perf_counter() - begin
        reset_peak()
        return {
            "compile_seconds": {"first_step": seconds},
            "batch": settings.batch,
            "length": settings.length,
            "dtype": settings.dtype,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }

    def turn(self, note: Note, steps: int) -> dict[str, Any]:
        """Seconds of each of `steps` steps after a warm-up, the last loss and the peak memory."""
        del note
        for _ in range(WARMUP_STEPS):
            self.step()
        marks = [time.perf_counter()]
        for _ in range(steps):
            loss = self.step()
            marks.append(time.perf_counter())
        seconds = [after - before for before, after in itertools.pairwise(marks)]
        return {"step_seconds": seconds, "loss": loss, **self._peak_memory()}

    def _peak_memory(self) -> dict[str, Any]:
        import torch

        if self.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated()
            return {"peak_memory_bytes": peak, "memory_of": "fullest device"}
        return {
            "peak_memory_bytes": peak_resident_bytes() - self.before,
            "memory_of": "growth of the process",
        }


def main() -> None:
    training = _Training()
    serve({"start": training.start, "turn": training.turn})

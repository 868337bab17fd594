"""What a person sees while a run goes: one progress line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table


class Progress:
    """Shows a run's progress; messages stand above it.

    On a terminal one line is drawn over itself, with a bar that takes the room that is left. It is
    drawn from `update` alone, without a thread of its own. Elsewhere (a file, a pipe, a dumb
    terminal) every update is a line with the same content, flushed.

    Args:
      stream: where to write; standard output if None.
    """

    def __init__(self, stream: TextIO | None = None):
        stream = sys.stdout if stream is None else stream
        if isinstance(stream, io.TextIOWrapper):
            # A sample that the terminal's encoding cannot show must not end a run.
            stream.reconfigure(errors="replace")
        self._stream = stream
        self._live: Live | None = None
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            self._live = Live(
                console=Console(file=stream, highlight=False), auto_refresh=False, screen=False
            )
            self._live.start()

    def update(
        self,
        step: int,
        total_steps: int,
        *,
        phase: int,
        length: int,
        loss: float | None,
        tokens_per_second: float | None,
        seconds_left: float | None,
    ) -> None:
        """Shows the state after `step`; phases count from 1, and an unknown value is left out."""
        count = f"{step}/{total_steps}"
        parts = [f"phase {phase} (length {length})"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if tokens_per_second is not None:
            parts.append(f"{short_number(tokens_per_second)} tokens/s")
        if seconds_left is not None:
            parts.append(f"{clock_time(seconds_left)} left")
        text = "  ".join(parts)
        if self._live is None:
            print(f"step {count}  {text}", file=self._stream, flush=True)
            return
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(count, ProgressBar(total=total_steps, completed=step), text)
        self._live.update(line, refresh=True)

    def message(self, text: str) -> None:
        """Prints one or more lines above the progress line."""
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last progress line in place and gives the terminal back."""
        if self._live is not None:
            self._live.stop()


def align(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows of cells as lines whose columns stand under one another; those of `right` end together.

    Widths are those of a terminal, in which a Chinese character takes two places.
    """
    columns = zip(*rows, strict=True)
    widths = [max(map(cell_len, column)) for column in columns]
    lines = []
    for row in rows:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [
            g + c if i in right else c + g for i, (c, g) in enumerate(zip(row, gaps, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def short_number(value: float) -> str:
    """Three significant figures with a suffix: 87.2, 1.23k, 45.6k, 1.5M."""
    for suffix in ("", "k", "M", "G"):
        if value < 999.5 or suffix == "G":
            break
        value /= 1000
    return f"{value:.0f}{suffix}" if value >= 99.95 else f"{value:.3g}{suffix}"


def clock_time(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Draws how well a reward model knows what it knows, on the held-out comparisons of its run.

    python -m tools.calibration --workdir=RUN[,RUN...] --output=F.png

A point is a bin of the probability that the model gives its choice, σ(difference of rewards): how
often the choice is right. On the diagonal the model is calibrated. Points are as large as their
bins are full; the figures are those of the run's last evaluation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from absl import flags

from llm_jax.errors import UserError
from tools.cli import run_tool
from tools.plot import COLORS, new_figure, save_figure, tidy

RIGHT, PAIRS = "eval/validation/calibration/", "eval/validation/calibration_pairs/"


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_list("workdir", [], "runs of reward models, by commas", flag_values=values)
    flags.DEFINE_string("output", None, "picture to write: .png, .svg or .pdf", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    if not values.workdir or not values.output:
        raise UserError("--workdir=RUN and --output=F.png are both needed.")
    figure = new_figure(5, 4.6)
    panel = figure.subplots()
    panel.plot([0.5, 1], [0.5, 1], color="#9aa3ab", linestyle="--", linewidth=1)
    for index, workdir in enumerate(values.workdir):
        centres, right, pairs, error = read_calibration(Path(workdir))
        panel.plot(centres, right, color=COLORS[index % len(COLORS)], linewidth=1)
        panel.scatter(
            centres,
            right,
            s=30 + 300 * pairs / pairs.sum(),
            color=COLORS[index % len(COLORS)],
            label=f"{Path(workdir).name}, error {error:.3f}",
        )
    tidy(panel)
    panel.set_xlim(0.5, 1)
    panel.set_ylim(0, 1.02)
    panel.set_xlabel("probability given to the choice")
    panel.set_ylabel("share of right choices")
    panel.legend(frameon=False, loc="lower right")
    save_figure(figure, values.output)
    print(values.output)


def read_calibration(workdir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Centres of the bins, share of right choices, pairs [bins] each, and the calibration error.

    Raises:
      UserError: the run has no such evaluation.
    """
    from llm_jax.evals.preferences import BINS
    from llm_jax.metrics import read_metrics_file

    records = read_metrics_file(workdir / "metrics.jsonl")
    last = next((r for r in reversed(records) if any(k.startswith(RIGHT) for k in r)), None)
    if last is None:
        raise UserError(f"{workdir} has no calibration: it is no run of a reward model.")
    lower = sorted(key.removeprefix(RIGHT) for key in last if key.startswith(RIGHT))
    centres = np.array([float(edge) for edge in lower]) + (BINS[1] - BINS[0]) / 2
    right, pairs = (np.array([last[prefix + edge] for edge in lower]) for prefix in (RIGHT, PAIRS))
    return centres, right, pairs, last["eval/validation/calibration_error"]


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))

"""What is known of measures by their names alone."""

from __future__ import annotations

import re
from typing import Literal

Direction = Literal["lowest", "highest"]

_LOWEST = r"(\w+_)?(loss|perplexity)|bits_per_byte|calibration_error"
_HIGHEST = r"accuracy(_by_bytes|_unconditional)?|exact_match|token_f1|reward|pass@\d+|win_rate|"
_HIGHEST += r"accuracies|margins"


def best_end(key: str) -> Direction | None:
    """Which end of a measure is the best, by the last part of a key such as eval/validation/loss;
    None of one that is not known, and of those, such as a length, that have no best end."""
    name = key.rsplit("/", 1)[-1]
    if re.fullmatch(_LOWEST, name):
        return "lowest"
    return "highest" if re.fullmatch(_HIGHEST, name) else None


def is_figure(key: str) -> bool:
    """Whether a key is a measure of its own: no standard error, and no point of a curve such as
    loss_by_position/64."""
    return not key.endswith("_stderr") and re.search(r"/[\d.]+$", key) is None

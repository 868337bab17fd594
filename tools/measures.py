"""What the tools know of measures by their names alone."""

from __future__ import annotations

import re

_LOWER = r"(\w+_)?(loss|perplexity)|bits_per_byte|calibration_error"
_HIGHER = r"accuracy(_by_bytes|_unconditional)?|exact_match|token_f1|reward|pass@\d+|win_rate|"
_HIGHER += r"accuracies|margins"


def lower_is_better(key: str) -> bool:
    """Whether less of it is better, by the last part of a key such as eval/validation/loss."""
    return re.fullmatch(_LOWER, key.rsplit("/", 1)[-1]) is not None


def higher_is_better(key: str) -> bool:
    """Whether more of it is better; of some measures, such as a length, neither is."""
    return re.fullmatch(_HIGHER, key.rsplit("/", 1)[-1]) is not None


def is_figure(key: str) -> bool:
    """Whether a key is a measure of its own: no standard error, and no point of a curve such as
    loss_by_position/64."""
    return not key.endswith("_stderr") and re.search(r"/[\d.]+$", key) is None

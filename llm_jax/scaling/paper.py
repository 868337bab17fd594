"""Training in figures: arithmetic, time, money, checkpoints and failures, by formulas on paper.

N parameters, D tokens; FLOPs are floating-point operations, and FLOP/s those in a second.
"""

from __future__ import annotations

import math

TOKENS_A_PARAMETER = 20  # that training by Hoffmann et al. 2022 (arXiv:2203.15556) spends best

SECONDS_AN_HOUR = 3600

# 419 interruptions that no one had planned, in 54 days on 16,384 H100 (arXiv:2407.21783, section
# 3.3.4): a chip and its share of everything around it fail once in so many hours.
HOURS_BETWEEN_FAILURES = 54 * 24 * 16_384 / 419

# How much a human being reads: silent reading of English prose (Brysbaert 2019, doi:
# 10.1016/j.jml.2019.104047), eight hours of every day, from the age of five to that of eighty.
WORDS_A_MINUTE = 238
READING_HOURS_A_DAY = 8
READING_YEARS = 75
DAYS_A_YEAR = 365.25
TOKENS_A_WORD = 4 / 3  # of English under a vocabulary of some 32,000 to 128,000


# --- arithmetic and time --------------------------------------------------------------------------


def training_flops(parameters: float, tokens: float) -> float:
    """6·N·D: two FLOPs a parameter and token forward and four backward, without attention's
    products (Kaplan et al. 2020, arXiv:2001.08361). `models.size.flops_per_token` counts those too.
    """
    return 6.0 * parameters * tokens


def training_seconds(flops: float, sustained: float) -> float:
    """Seconds of `flops` at `sustained` FLOP/s, of all chips together."""
    return flops / sustained


def chip_hours(flops: float, peak: float, utilisation: float) -> float:
    """Hours of one chip for `flops`, or the hours of all chips added up.

    Args:
      peak: FLOP/s of a chip. utilisation: the share of it that training reaches (MFU).
    """
    return flops / (peak * utilisation) / SECONDS_AN_HOUR


def optimal_tokens(parameters: float) -> float:
    """Tokens on which a model of this size spends its FLOPs best."""
    return TOKENS_A_PARAMETER * parameters


def reading_lifetimes(tokens: float) -> float:
    """Human lifetimes of reading in so many tokens, under the assumptions above."""
    minutes = READING_YEARS * DAYS_A_YEAR * READING_HOURS_A_DAY * 60
    return tokens / (TOKENS_A_WORD * WORDS_A_MINUTE * minutes)


# --- checkpoints and failures ---------------------------------------------------------------------


def seconds_between_failures(chips: int, hours_a_chip: float = HOURS_BETWEEN_FAILURES) -> float:
    """Mean seconds between failures of any of the chips, each of which ends the run."""
    return hours_a_chip * SECONDS_AN_HOUR / chips


def save_interval(write_seconds: float, between_failures: float) -> float:
    """Seconds of training between two saves that lose the least: √(2 · δ · M).

    Young 1974, "A first order approximation to the optimum checkpoint interval"; right while δ, the
    seconds that a save holds training up, are few against M, the mean seconds between failures.
    """
    return math.sqrt(2 * write_seconds * between_failures)


def lost_share(
    interval: float, write_seconds: float, between_failures: float, restart_seconds: float = 0
) -> float:
    """The share of time that saving and failing take: δ/τ for the saves; of each failure half an
    interval that is done again, and the restart: (τ/2 + R)/M.

    Args:
      interval: τ, seconds of training between saves.
      write_seconds: δ. between_failures: M, seconds. restart_seconds: R.
    """
    return write_seconds / interval + (interval / 2 + restart_seconds) / between_failures

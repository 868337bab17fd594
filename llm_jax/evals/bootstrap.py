"""Is the difference between two models real, and how sure? Paired bootstrap over what both were
measured on, and over seeds.

A measure is a ratio of two sums over units: bits over bytes of documents, nats over tokens, points
over examples (each of which counts 1). Both models are measured on the same units, so each resample
draws units once, for both (Koehn 2004, "Statistical Significance Tests for Machine Translation
Evaluation"; Berg-Kirkpatrick et al. 2012): what is hard for both is no difference between them.

Legend: A and B the models, S seeds of a model, U units, R resamples.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import special

RESAMPLES = 10_000
_BLOCK = 1 << 22  # draws at a time, so that memory stays bounded


@dataclasses.dataclass(frozen=True)
class Sample:
    """A measure of one model, of one or several seeds, unit by unit.

    amounts_SU: float, what is summed, such as bits. sizes_SU: float, over what it is divided, such
    as bytes; positive in sum.
    """

    amounts_SU: np.ndarray
    sizes_SU: np.ndarray

    @property
    def seeds(self) -> int:
        return len(self.amounts_SU)

    @property
    def value(self) -> float:
        """The measure, as the mean over the seeds."""
        return float(np.mean(self.amounts_SU.sum(axis=1) / self.sizes_SU.sum(axis=1)))


@dataclasses.dataclass(frozen=True)
class Difference:
    """The measure of A minus that of B.

    stderr: its standard error. low, high: its interval of the wanted confidence. probability_lower:
    that A's is the lower one, ties counted half. units, seeds_a, seeds_b: what was resampled; of a
    model with one seed, the noise of seeds is unknown and not in here.
    """

    a: float
    b: float
    difference: float
    stderr: float
    low: float
    high: float
    probability_lower: float
    units: int
    seeds_a: int
    seeds_b: int


def compare(
    a: Sample,
    b: Sample,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Compares two models by resampling the units, and the seeds of each model that has several.

    With one seed each, the interval is the percentile one, and the probability the share of
    resamples. With several, units and seeds are resampled together (Owen 2007, "The pigeonhole
    bootstrap"): of n seeds, n - 1 are drawn, which makes the variance of their mean unbiased
    (McCarthy and Snowden 1985, "The Bootstrap and Finite Population Sampling"). Noise that one unit
    has in one seed is counted more than once by that, so intervals are too wide rather than too
    narrow: 95 % ones covered 97 to 98 % in simulations of 2 to 5 seeds and 60 units, with standard
    deviations of 0.15 over seeds and 0.5 of a unit in a seed. A few seeds give a few values, so
    percentiles of them mean little: the interval is Student's t with the standard error of the
    resamples, and degrees of freedom by Welch and Satterthwaite, from the shares of units and
    seeds in it.

    Args:
      a, b: on the same units in the same order.
      confidence: of the interval, such as 0.95.
      resamples: how many; of 10,000 the ends of a 95 % interval have a standard error of 0.7 % of
        its width.
      seed: the same seed gives the same answer.

    Raises:
      ValueError: other units, none, or seeds whose sizes sum to nothing.
    """
    units = a.amounts_SU.shape[1]
    shapes = {x.shape[1] for s in (a, b) for x in (s.amounts_SU, s.sizes_SU)}
    if shapes != {units} or not units:
        raise ValueError(f"both models need the same units: they have {sorted(shapes)}.")
    if min(s.sizes_SU.sum(axis=1).min() for s in (a, b)) <= 0:
        raise ValueError("the units of a seed have no size.")
    rng = np.random.default_rng(seed)
    values_a_RS, values_b_RS = _resampled_units(rng, (a, b), resamples)
    differences = _over_seeds(rng, values_a_RS) - _over_seeds(rng, values_b_RS)
    difference = a.value - b.value
    stderr = float(np.std(differences, ddof=1))
    tail = (1 - confidence) / 2
    if max(a.seeds, b.seeds) == 1:
        low, high = np.quantile(differences, [tail, 1 - tail])
        lower = np.mean(differences < 0) + np.mean(differences == 0) / 2
    else:
        by_units = np.mean(values_a_RS, axis=1) - np.mean(values_b_RS, axis=1)
        freedom = _degrees_of_freedom(float(np.var(by_units, ddof=1)), (a, b))
        reach = special.stdtrit(freedom, 1 - tail) * stderr
        low, high = difference - reach, difference + reach
        lower = (
            special.stdtr(freedom, -difference / stderr)
            if stderr
            else (difference < 0) + (difference == 0) / 2
        )
    return Difference(
        a=a.value,
        b=b.value,
        difference=difference,
        stderr=stderr,
        low=float(low),
        high=float(high),
        probability_lower=float(lower),
        units=units,
        seeds_a=a.seeds,
        seeds_b=b.seeds,
    )


def _resampled_units(
    rng: np.random.Generator, samples: tuple[Sample, ...], resamples: int
) -> list[np.ndarray]:
    """The measure of each seed of each model on resampled units, the same units for all:
    [R, S] for each model."""
    units = samples[0].amounts_SU.shape[1]
    values: list[list[np.ndarray]] = [[] for _ in samples]
    block = max(1, _BLOCK // units)
    for begin in range(0, resamples, block):
        rows = min(block, resamples - begin)
        drawn = rng.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        counts_RU = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        for kept, sample in zip(values, samples, strict=True):
            with np.errstate(invalid="ignore", divide="ignore"):
                kept.append((counts_RU @ sample.amounts_SU.T) / (counts_RU @ sample.sizes_SU.T))
    return [np.concatenate(kept) for kept in values]


def _over_seeds(rng: np.random.Generator, values_RS: np.ndarray) -> np.ndarray:
    """float [R]: the mean over seeds, which are drawn anew for every resample."""
    resamples, seeds = values_RS.shape
    if seeds == 1:
        return values_RS[:, 0]
    drawn = rng.integers(seeds, size=(resamples, seeds - 1))
    return np.take_along_axis(values_RS, drawn, axis=1).mean(axis=1)


def _degrees_of_freedom(variance_of_units: float, samples: tuple[Sample, ...]) -> float:
    """Of a standard error that is made of those of units and of each model's seeds (Satterthwaite
    1946)."""
    units = samples[0].amounts_SU.shape[1]
    parts = [(variance_of_units, units - 1)]
    for sample in samples:
        if sample.seeds > 1:
            values = sample.amounts_SU.sum(axis=1) / sample.sizes_SU.sum(axis=1)
            parts.append((float(np.var(values, ddof=1)) / sample.seeds, sample.seeds - 1))
    total = sum(variance for variance, _ in parts)
    squares = sum(variance**2 / max(freedom, 1) for variance, freedom in parts)
    return total**2 / squares if squares else float(units)

"""The pipeline's schedule: who works on what when."""

import pytest

from llm_jax.errors import UserError
from llm_jax.models.pipeline import PipelineConfig, Schedule, bubble_share


def simulated(stages, micro_batches, repeats):
    """For each iteration what each stage works on, (micro-batch, repeat) or None: a ring of stages
    that is fed wherever what comes round is done."""
    waiting, ring, seen = list(range(micro_batches)), [None] * stages, []
    while True:
        last = ring.pop()
        again = last is not None and last[1] + 1 < repeats
        if again:
            ring.insert(0, (last[0], last[1] + 1))
        else:
            ring.insert(0, (waiting.pop(0), 0) if waiting else None)
        if not any(ring):
            return seen
        seen.append(list(ring))


@pytest.mark.parametrize("stages, micro_batches, repeats", [
    (2, 2, 1), (2, 6, 1), (4, 8, 1), (2, 2, 2), (2, 6, 3), (4, 8, 2), (3, 9, 4),
])  # fmt: skip
def test_the_schedule_is_that_of_a_ring_that_is_fed(stages, micro_batches, repeats):
    schedule = Schedule(stages, micro_batches, repeats)
    expected = simulated(stages, micro_batches, repeats)
    assert schedule.iterations == len(expected)
    waits = 0
    for iteration, ring in enumerate(expected):
        for stage, wanted in enumerate(ring):
            micro_batch, repeat, busy = schedule.work(iteration, stage)
            assert 0 <= micro_batch < micro_batches and 0 <= repeat < repeats
            assert (int(micro_batch), int(repeat)) == wanted if busy else wanted is None
            waits += wanted is None
    share = waits / (stages * len(expected))
    assert bubble_share(stages, micro_batches, repeats) == pytest.approx(share)


def test_the_bubble_shrinks_with_micro_batches_and_repeats():
    assert bubble_share(4, 8) == pytest.approx(3 / 11)
    assert bubble_share(4, 8, 4) == pytest.approx(3 / 35)
    assert bubble_share(1, 8) == 0


@pytest.mark.parametrize("name", ["micro_batches", "repeats"])
def test_settings_are_positive(name):
    with pytest.raises(UserError, match=rf"model\.pipeline\.{name}=0 must be positive"):
        PipelineConfig(**{name: 0})

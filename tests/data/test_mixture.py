"""Mixture: the batch is a function of the step, whoever reads it."""

import types
from collections import Counter

import numpy as np
import pytest

from llm_jax.data import mixture, packing
from llm_jax.errors import UserError


def make_rows(first_token, rows, length=4):
    """Rows of one document each; the first token of a row names it."""
    size = length + 1
    tokens = first_token + np.arange(rows * size, dtype=np.uint32)
    offsets = np.arange(rows + 1, dtype=np.int64) * size
    store = types.SimpleNamespace(tokens=tokens, offsets=offsets, trained=None)
    return packing.pack(store, length, "best_fit")


COMPONENTS = {"text": make_rows(0, 17), "code": make_rows(1000, 5)}
WEIGHTS = {"text": 0.75, "code": 0.25}


def names_of(dataset, steps):
    """The first token of every row of the first batches."""
    return np.concatenate([dataset[k].tokens[:, 0] for k in range(steps)])


def assert_same(left, right):
    for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [1, 5], [7]])
def test_some_rows_of_a_batch_are_those_of_the_whole(places):
    whole = mixture.batches(COMPONENTS, WEIGHTS, 8, seed=3)
    part = mixture.batches(COMPONENTS, WEIGHTS, 8, seed=3, places=places)
    for k in (0, 1, 50):
        assert part[k].tokens.shape == (len(places), 4)
        np.testing.assert_array_equal(part[k].tokens, whole[k].tokens[places])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetch_starts_at_any_step_with_the_same_batches(threads):
    dataset = mixture.batches(COMPONENTS, WEIGHTS, 4, seed=0)
    again = mixture.batches(COMPONENTS, WEIGHTS, 4, seed=0)
    for start in (0, 7, 1000):
        iterator = mixture.prefetch(again, start, threads=threads)
        for k in range(start, start + 6):
            assert_same(next(iterator), dataset[k])


def test_proportions_match_the_weights_in_every_stretch():
    tokens = names_of(mixture.batches(COMPONENTS, WEIGHTS, 4, seed=0), 100)
    is_code = tokens >= 1000
    assert is_code.mean() == 0.25
    assert np.all(np.abs(np.cumsum(is_code) - 0.25 * np.arange(1, 401)) <= 1)


def test_uneven_weights_are_kept_within_a_hundredth_of_the_smallest():
    weights = {"text": 0.7, "code": 0.3}
    tokens = names_of(mixture.batches(COMPONENTS, weights, 10, seed=0), 300)
    assert (tokens >= 1000).mean() == pytest.approx(0.3, rel=0.01)


def test_no_row_repeats_before_its_component_has_been_read_once():
    tokens = names_of(mixture.batches(COMPONENTS, WEIGHTS, 4, seed=0), 102)
    for name, drawn in (("text", tokens[tokens < 1000]), ("code", tokens[tokens >= 1000])):
        size = len(COMPONENTS[name])
        whole_epochs = [drawn[i : i + size].tolist() for i in range(0, len(drawn) - size + 1, size)]
        assert len(whole_epochs) >= 6
        assert all(max(Counter(epoch).values()) == 1 for epoch in whole_epochs)
        assert whole_epochs[0] != whole_epochs[1]


def test_neighbouring_seeds_share_no_epoch():
    """Epoch 1 of a run must not be epoch 0 of the run with the next seed."""
    only_text = {"text": 1.0}
    first, second = (
        names_of(mixture.batches(COMPONENTS, only_text, 17, seed=seed), 4).reshape(4, 17)
        for seed in (0, 1)
    )
    orders = {tuple(epoch) for epoch in np.concatenate([first, second])}
    assert len(orders) == 8


def test_a_component_keeps_its_order_when_another_joins():
    alone = names_of(mixture.batches(COMPONENTS, {"text": 1.0}, 3, seed=0), 4)
    mixed = names_of(mixture.batches(COMPONENTS, WEIGHTS, 4, seed=0), 4)
    np.testing.assert_array_equal(mixed[mixed < 1000], alone)


def test_order_of_the_weights_and_components_of_weight_zero_do_not_matter():
    plain = mixture.batches(COMPONENTS, WEIGHTS, 4, seed=0)
    components = {"code": COMPONENTS["code"], "other": make_rows(5000, 3), **COMPONENTS}
    turned = mixture.batches(components, {"other": 0.0, "code": 1, "text": 3}, 4, seed=0)
    for k in range(5):
        assert_same(plain[k], turned[k])


def test_epochs_counts_what_was_read():
    got = mixture.epochs(COMPONENTS, WEIGHTS, batch_size=4, step=51)
    assert got == {"text": pytest.approx(204 * 0.75 / 17), "code": pytest.approx(204 * 0.25 / 5)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"texts": 1.0}, "Did you mean 'text'"),
        ({"text": -1.0}, "'text' is -1.0"),
        ({"text": float("nan")}, "'text' is nan"),
        ({"text": 0.0}, "no component has a positive weight"),
        ({"text": 1.0, "long": 1.0}, "one length"),
    ],
)
def test_bad_weights_are_one_clear_line(weights, message):
    components = {**COMPONENTS, "long": make_rows(0, 3, length=8)}
    with pytest.raises(UserError, match=message):
        mixture.batches(components, weights, 4, seed=0)


def test_a_batch_without_rows_is_refused():
    with pytest.raises(UserError, match="a batch of 0 rows"):
        mixture.batches(COMPONENTS, WEIGHTS, 0, seed=0)

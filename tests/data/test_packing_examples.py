"""Packing of examples: what is trained, what is cut off, what is left out, and that it is told."""

import types

import numpy as np
import pytest

from llm_jax.data import packing
from llm_jax.errors import UserError


def make_store(*masks):
    """A store whose every token is different, with a mask of trained tokens for each example."""
    trained = [np.array([int(mark) for mark in mask], np.uint8) for mask in masks]
    sizes = [len(mask) for mask in trained]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return types.SimpleNamespace(
        tokens=np.arange(offsets[-1], dtype=np.uint16),
        offsets=offsets,
        trained=np.concatenate(trained),
    )


def used(store, limit, too_long):
    """The tokens of each example that are used, and the two counts."""
    clipped = packing.clip(store, limit, too_long)
    spans = [list(range(b, e)) for b, e in zip(clipped.begins, clipped.ends, strict=True)]
    return spans, clipped.too_long, clipped.untrained


def test_trained_tokens_are_the_targets_that_count():
    row = packing.pack(make_store("0011", "0101"), 8, "best_fit")[0]
    np.testing.assert_array_equal(row.tokens, [0, 1, 2, 4, 5, 6, 0, 0])
    np.testing.assert_array_equal(row.targets, [1, 2, 3, 5, 6, 7, 0, 0])
    np.testing.assert_array_equal(row.loss_weights, [0, 1, 1, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(row.segment_ids, [1, 1, 1, 2, 2, 2, 0, 0])
    assert row.loss_weights.dtype == np.float32


@pytest.mark.parametrize("how", ["best_fit", "single"])
def test_a_text_counts_every_target(how):
    store = make_store("0000", "000")
    store.trained = None
    weights = [
        row.loss_weights[row.segment_ids > 0] for row in iterate(packing.pack(store, 3, how))
    ]
    assert np.concatenate(weights).tolist() == [1.0] * 5


def iterate(rows):
    return [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize(
    ("too_long", "spans"),
    [
        ("truncate_right", [[0, 1, 2, 3], [6, 7, 8, 9], [10, 11]]),
        ("truncate_left", [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]),
        ("drop", [[], [6, 7, 8, 9], [10, 11]]),
    ],
)
def test_what_becomes_of_an_example_that_is_too_long(too_long, spans):
    store = make_store("010101", "0001", "01")
    assert used(store, 4, too_long) == (spans, 1, 0)


def test_examples_without_a_trained_target_are_left_out_and_counted():
    # One is never trained, one only where nothing stands before, one behind its cut.
    store = make_store("0000", "1000", "000001", "0100")
    assert used(store, 4, "truncate_right") == ([[], [], [], [14, 15, 16, 17]], 1, 3)
    assert used(store, 4, "truncate_left") == (
        [[], [], [10, 11, 12, 13], [14, 15, 16, 17]],
        1,
        2,
    )
    # What was dropped for its length is not counted a second time.
    assert used(store, 4, "drop") == ([[], [], [], [14, 15, 16, 17]], 1, 2)


def test_cutting_at_the_left_leaves_out_what_the_cut_makes_the_first_token():
    assert used(make_store("001000"), 4, "truncate_left") == ([[]], 1, 1)
    assert used(make_store("000100"), 4, "truncate_left") == ([[2, 3, 4, 5]], 1, 0)


def test_texts_are_never_clipped():
    store = make_store("0" * 9, "0")
    store.trained = None
    assert used(store, 4, "drop") == ([list(range(9)), [9]], 0, 0)


def test_a_row_holds_one_token_more_than_its_length():
    rows = packing.pack(make_store("00111", "001111"), 4, "best_fit")
    assert rows.clipped.too_long == 1
    np.testing.assert_array_equal(rows[0].targets, [1, 2, 3, 4])
    np.testing.assert_array_equal(rows[1].targets, [6, 7, 8, 9])


@pytest.mark.parametrize("how", ["best_fit", "single"])
@pytest.mark.parametrize("too_long", ["truncate_right", "truncate_left", "drop"])
def test_no_example_lies_in_two_rows(how, too_long):
    rng = np.random.default_rng(0)
    masks = ["0" + "1" * int(size) for size in rng.integers(1, 30, 50)]
    rows = packing.pack(make_store(*masks), 11, how, too_long)
    assert rows.cut_documents == 0 and rows.clipped.too_long > 0
    seen = [d for i in range(len(rows)) for d in np.unique(rows.documents(i)) if d >= 0]
    wanted = [i for i, mask in enumerate(masks) if too_long != "drop" or len(mask) <= 12]
    assert sorted(seen) == wanted


def test_single_packing_gives_each_example_a_row_of_its_own():
    rows = packing.pack(make_store("01", "0011", "0000", "011"), 3, "single")
    assert len(rows) == 3  # the one that trains nothing has none
    assert [rows.documents(i).tolist() for i in range(3)] == [[0, -1, -1], [1, 1, 1], [3, 3, -1]]
    assert [rows[i].loss_weights.tolist() for i in range(3)] == [[1, 0, 0], [0, 1, 1], [1, 1, 0]]
    assert rows.padding_share == pytest.approx(1 - 6 / 9)
    with pytest.raises(IndexError):
        rows[3]


def test_single_packing_cuts_texts_into_rows():
    store = make_store("0" * 8)
    store.trained = None
    rows = packing.pack(store, 3, "single")
    assert [row.targets.tolist() for row in iterate(rows)] == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert rows.cut_documents == 1


def test_examples_are_not_concatenated():
    with pytest.raises(UserError, match=r"would cut examples: use best_fit or single\."):
        packing.pack(make_store("01"), 4, "concatenate")


def test_nothing_left_to_train_on_is_one_clear_line():
    with pytest.raises(UserError, match=r"length 2: check the data source \(2 examples are too"):
        packing.pack(make_store("0111", "0111"), 2, "best_fit", "drop")
    with pytest.raises(UserError, match=r"nothing is left to train on.*check the data source\."):
        packing.pack(make_store("000"), 4, "best_fit")

"""Packing: every pair once, documents apart, best fit as good as the textbook's."""

import types
from collections import Counter

import numpy as np
import pytest

from llm_jax.data import packing
from llm_jax.errors import UserError


def make_store(sizes):
    """A store whose every token is different, so that a pair names its own place."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return types.SimpleNamespace(
        tokens=np.arange(offsets[-1], dtype=np.uint32), offsets=offsets, trained=None
    )


def ragged_sizes(seed, documents=60):
    return np.random.default_rng(seed).integers(2, 40, documents)


def naive_best_fit_decreasing(sizes, capacity):
    """Remaining spaces of the bins, by the quadratic definition."""
    spaces = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= size]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= size
        else:
            spaces.append(capacity - size)
    return sorted(spaces)


@pytest.mark.parametrize("how", ["concatenate", "best_fit"])
@pytest.mark.parametrize("length", [1, 7, 16, 1000])
def test_every_pair_appears_exactly_once(how, length):
    store = make_store(ragged_sizes(0))
    rows = packing.pack(store, length, how)
    seen = Counter()
    for i in range(len(rows)):
        row, documents = rows[i], rows.documents(i)
        real = row.segment_ids > 0
        np.testing.assert_array_equal(row.loss_weights, real)
        np.testing.assert_array_equal(documents >= 0, real)
        seen.update(zip(documents[real], row.tokens[real], row.targets[real], strict=True))
    expected = Counter(
        (document, token, token + 1)
        for document, (begin, end) in enumerate(
            zip(store.offsets[:-1], store.offsets[1:], strict=True)
        )
        for token in range(begin, end - 1)
    )
    assert seen == expected


@pytest.mark.parametrize("how", ["concatenate", "best_fit"])
def test_positions_and_segments_restart_with_every_document(how):
    store = make_store(ragged_sizes(1))
    rows = packing.pack(store, 32, how)
    for i in range(len(rows)):
        row, documents = rows[i], rows.documents(i)
        real = int(np.sum(row.segment_ids > 0))
        assert np.all(row.segment_ids[real:] == 0)
        new_document = np.flatnonzero(np.diff(documents[:real], prepend=-1))
        np.testing.assert_array_equal(
            np.flatnonzero(np.diff(row.segment_ids[:real], prepend=0)), new_document
        )
        np.testing.assert_array_equal(np.flatnonzero(row.positions[:real] == 0), new_document)
        inside = np.setdiff1d(np.arange(1, real), new_document)
        np.testing.assert_array_equal(row.positions[inside], row.positions[inside - 1] + 1)
        np.testing.assert_array_equal(row.tokens[inside], row.targets[inside - 1])


def test_a_row_by_hand():
    store = make_store([4, 3])  # pairs: 0→1 1→2 2→3 and 4→5 5→6
    row = packing.pack(store, 4, "concatenate")[0]
    np.testing.assert_array_equal(row.tokens, [0, 1, 2, 4])
    np.testing.assert_array_equal(row.targets, [1, 2, 3, 5])
    np.testing.assert_array_equal(row.segment_ids, [1, 1, 1, 2])
    np.testing.assert_array_equal(row.positions, [0, 1, 2, 0])
    assert [row.tokens.dtype, row.loss_weights.dtype] == [np.int32, np.float32]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_decreasing_equals_its_definition(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    sizes = rng.integers(1, capacity + 1, 200)
    bins = packing.best_fit_decreasing(sizes, capacity)
    spaces = capacity - np.bincount(bins, weights=sizes)
    assert sorted(spaces.astype(int)) == naive_best_fit_decreasing(sizes.tolist(), capacity)


def test_best_fit_cuts_only_documents_longer_than_a_row():
    sizes = [11, 12, 6, 6, 31]  # pairs 10, 11, 5, 5, 30
    rows = packing.pack(make_store(sizes), 10, "best_fit")
    assert rows.cut_documents == 2
    rows_of = Counter(d for i in range(len(rows)) for d in set(rows.documents(i)) - {-1})
    assert rows_of == {0: 1, 1: 2, 2: 1, 3: 1, 4: 3}


def test_concatenate_counts_the_documents_it_cuts():
    rows = packing.pack(make_store([7, 7, 7]), 9, "concatenate")  # pairs 6 6 6, cut at 9
    assert (len(rows), rows.cut_documents, rows.padding_share) == (2, 1, 0.0)


@pytest.mark.parametrize("how", ["concatenate", "best_fit"])
def test_padding_share_is_the_share_of_positions_without_a_segment(how):
    rows = packing.pack(make_store(ragged_sizes(2)), 64, how)
    empty = np.mean([rows[i].segment_ids == 0 for i in range(len(rows))])
    assert empty > 0
    assert rows.padding_share == pytest.approx(empty)


def test_documents_without_a_pair_leave_no_trace():
    rows = packing.pack(make_store([1, 4, 1, 1, 3, 1]), 5, "concatenate")
    assert len(rows) == 1
    np.testing.assert_array_equal(rows.documents(0), [1, 1, 1, 4, 4])
    np.testing.assert_array_equal(rows[0].segment_ids, [1, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("sizes", "length", "how", "message"),
    [
        ([5], 0, "best_fit", "length positive"),
        ([5], 4, "first_fit", "concatenate, best_fit"),
        ([1, 1], 4, "concatenate", "nothing is left to train on"),
    ],
)
def test_bad_input_is_one_clear_line(sizes, length, how, message):
    with pytest.raises(UserError, match=message):
        packing.pack(make_store(sizes), length, how)


def test_a_row_out_of_range_is_an_index_error():
    rows = packing.pack(make_store([5, 5]), 4, "best_fit")
    with pytest.raises(IndexError):
        rows[len(rows)]

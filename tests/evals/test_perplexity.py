"""Perplexity: closed forms of a uniform model, standard errors, and batches that change nothing."""

import functools
import types

import numpy as np
import pytest

from llm_jax.data import packing
from llm_jax.errors import UserError
from llm_jax.evals.batching import padded_batches
from llm_jax.evals.perplexity import LN_2, bits_per_byte, evaluate_perplexity

VOCABULARY, EOS, LENGTH = 13, 12, 16
TOKEN_BYTES = np.array([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 0, 0], np.int32)


def make_rows(sizes, packing_name="best_fit"):
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(0, 11, size - 1), EOS) for size in sizes]
    store = types.SimpleNamespace(
        tokens=np.concatenate(documents),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        trained=None,
    )
    return packing.pack(store, LENGTH, packing_name)


SIZES = np.random.default_rng(1).integers(2, 40, 30)
ROWS = make_rows(SIZES)


def uniform(params, batch):
    return np.full(batch.targets.shape, np.log(params), np.float32)


def by_target(params, batch):
    """Nats that differ from target to target, and are enormous on padding."""
    return np.where(batch.segment_ids > 0, params + 0.1 * batch.targets, 1e9).astype(np.float32)


def targets_by_document():
    real = [(ROWS[i], ROWS.documents(i)) for i in range(len(ROWS))]
    return [
        np.concatenate([row.targets[documents == d] for row, documents in real])
        for d in range(len(SIZES))
    ]


def test_a_uniform_model_has_the_loss_log_vocabulary():
    result = evaluate_perplexity(uniform, VOCABULARY, ROWS, TOKEN_BYTES, batch_size=4)
    assert result["loss"] == pytest.approx(np.log(VOCABULARY), rel=1e-6)
    assert result["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
    by_position = {k: v for k, v in result.items() if k.startswith("loss_by_position/")}
    assert list(by_position) == [f"loss_by_position/{p}" for p in (0, 1, 2, 4, 8)]
    assert all(v == pytest.approx(np.log(VOCABULARY), rel=1e-6) for v in by_position.values())


def test_bits_per_byte_weights_by_bytes_and_leaves_special_targets_out():
    result = evaluate_perplexity(uniform, VOCABULARY, ROWS, TOKEN_BYTES, batch_size=4)
    ordinary = np.concatenate(targets_by_document())
    ordinary = ordinary[ordinary != EOS]
    exact = len(ordinary) * np.log2(VOCABULARY) / TOKEN_BYTES[ordinary].sum()
    assert result["bits_per_byte"] == pytest.approx(exact, rel=1e-6)


def test_figures_equal_sums_over_documents():
    result = evaluate_perplexity(by_target, 1.0, ROWS, TOKEN_BYTES, batch_size=4)
    targets = targets_by_document()
    nats = [1.0 + 0.1 * t for t in targets]
    assert result["loss"] == pytest.approx(np.concatenate(nats).mean(), rel=1e-6)
    bits = np.array([n[t != EOS].sum() for n, t in zip(nats, targets, strict=True)]) / LN_2
    sizes = np.array([TOKEN_BYTES[t].sum() for t in targets])
    bits, sizes = bits[sizes > 0], sizes[sizes > 0]
    ratio = bits.sum() / sizes.sum()
    assert result["bits_per_byte"] == pytest.approx(ratio, rel=1e-6)
    residual = bits - ratio * sizes
    error = np.sqrt(len(bits) * np.var(residual, ddof=1)) / sizes.sum()
    assert result["bits_per_byte_stderr"] == pytest.approx(error, rel=1e-6)


def test_the_standard_error_agrees_with_a_bootstrap_over_documents():
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(400), rng.integers(1, 60, 400))
    rate = rng.gamma(4.0, 0.3, 400)[documents]  # documents differ in how hard they are
    sizes = rng.integers(1, 5, len(documents))
    nats = rng.exponential(rate)
    bits = np.bincount(documents, nats) / LN_2
    total = np.bincount(documents, sizes)
    draws = rng.integers(400, size=(4000, 400))
    bootstrap = np.std(bits[draws].sum(1) / total[draws].sum(1))
    result = bits_per_byte(nats, sizes, documents)
    assert result["bits_per_byte_stderr"] == pytest.approx(bootstrap, rel=0.05)


def test_one_document_has_no_standard_error_and_no_bytes_no_figure():
    ones = np.ones(3)
    assert set(bits_per_byte(ones, ones, np.zeros(3, int))) == {"bits_per_byte"}
    without = evaluate_perplexity(uniform, 2, ROWS, np.zeros(VOCABULARY, np.int32), batch_size=4)
    assert "loss" in without
    assert not any(name.startswith("bits_per_byte") for name in without)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_nothing_depends_on_the_batch_size_or_on_padding(batch_size):
    one = evaluate_perplexity(by_target, 1.0, ROWS, TOKEN_BYTES, batch_size=5)
    other = evaluate_perplexity(by_target, 1.0, ROWS, TOKEN_BYTES, batch_size=batch_size)
    assert one == pytest.approx(other, rel=1e-12)


def test_weights_scale_the_loss_and_zero_leaves_a_target_out():
    class Weighted:
        length = 2

        def __len__(self):
            return 1

        def __getitem__(self, index):
            row = ROWS[0]
            weights = np.zeros(LENGTH, np.float32)
            weights[:4] = 1.0, 3.0, 2.0, 5.0
            return row.replace(loss_weights=weights)

        def documents(self, index):
            return ROWS.documents(0)

    nats = 1.0 + 0.1 * ROWS[0].targets[:4]
    result = evaluate_perplexity(by_target, 1.0, Weighted(), TOKEN_BYTES, batch_size=2)
    assert result["loss"] == pytest.approx(nats @ [1, 3, 2, 5] / 11, rel=1e-6)
    assert result["loss_by_position/2"] == pytest.approx(nats[2:] @ [2, 5] / 7, rel=1e-6)
    assert "loss_by_position/4" not in result


def test_loss_by_position_by_hand():
    def position_nats(params, batch):
        return batch.positions.astype(np.float32)

    rows = make_rows([17])
    result = evaluate_perplexity(position_nats, None, rows, TOKEN_BYTES, batch_size=1)
    expected = {0: 0, 1: 1, 2: 2.5, 4: 5.5, 8: 11.5}
    assert {p: result[f"loss_by_position/{p}"] for p in expected} == expected


def test_the_jitted_function_sees_one_shape_and_the_same_count_for_any_number_of_rows():
    shapes = []

    def spy(params, batch):
        shapes.append(batch.tokens.shape)
        return uniform(params, batch)

    evaluate_perplexity(spy, 2, ROWS, TOKEN_BYTES, batch_size=4, max_rows=9)
    assert shapes == [(4, LENGTH)] * 3


def test_max_rows_takes_rows_from_everywhere():
    seen = []

    def spy(params, batch):
        seen.extend(batch.tokens[batch.segment_ids[:, 0] > 0])
        return uniform(params, batch)

    evaluate_perplexity(spy, 2, ROWS, TOKEN_BYTES, batch_size=2, max_rows=3)
    expected = [ROWS[i * len(ROWS) // 3].tokens for i in range(3)]
    np.testing.assert_array_equal(seen, expected)


def test_it_works_as_a_partial_of_params():
    run = functools.partial(
        evaluate_perplexity, uniform, rows=ROWS, token_bytes=TOKEN_BYTES, batch_size=8
    )
    assert run(VOCABULARY)["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)


def test_filling_rows_are_empty_in_every_array():
    ((chosen, batch),) = padded_batches(ROWS, [0, 1, 2], 5)
    assert list(chosen) == [0, 1, 2]
    for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions"):
        array = getattr(batch, name)
        assert array.shape == (5, LENGTH)
        assert not array[3:].any()
        np.testing.assert_array_equal(array[1], getattr(ROWS[1], name))


def test_nothing_to_count_is_one_clear_line():
    with pytest.raises(UserError, match="no target"):
        evaluate_perplexity(uniform, 2, ROWS, TOKEN_BYTES, batch_size=4, max_rows=0)
    with pytest.raises(UserError, match="at least 1"):
        evaluate_perplexity(uniform, 2, ROWS, TOKEN_BYTES, batch_size=0)

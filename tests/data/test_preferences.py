"""Comparisons as rows: which answers stand together, and every array of a row."""

import json

import numpy as np
import pytest

from llm_jax.data.example_store import ExampleConfig, comparison_stores
from llm_jax.data.preferences import PreferenceRows, Sequences, responses_of
from llm_jax.data.templates import make_template
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError

BYTES = ByteTokenizer()
BOS, USER, ASSISTANT, END = (
    BYTES.special_ids[name] for name in ("bos", "user", "assistant", "end_of_turn")
)


class Store:
    """A store of comparisons in memory: (prompt, answer, group, score[, strength]) of each."""

    def __init__(self, *documents):
        pieces = [np.array([*prompt, *answer]) for prompt, answer, *_ in documents]
        masks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer, *_ in documents]
        self.tokens = np.concatenate(pieces).astype(np.uint16)
        self.trained = np.concatenate(masks).astype(np.uint8)
        self.offsets = np.concatenate([[0], np.cumsum(list(map(len, pieces)))]).astype(np.int64)
        prompts = [tuple(prompt) for prompt, *_ in documents]
        self.columns = {
            "group": np.array([d[2] for d in documents], np.int64),
            "prompt": np.array([prompts.index(prompt) for prompt in prompts], np.int64),
            "score": np.array([d[3] for d in documents], np.float32),
            "strength": np.array([(*d, -1)[4] for d in documents], np.int8),
        }
        self.fingerprint = repr(documents)
        self.meta = type("Meta", (), {"source": "somewhere"})

    def __len__(self):
        return len(self.columns["group"])


def answers(rows, index):
    """The answers of a row as lists of tokens, those of padding empty."""
    responses = rows[index].responses
    return [
        targets[weights > 0].tolist()
        for targets, weights in zip(responses.targets, responses.loss_weights, strict=True)
    ]


def all_answers(rows):
    return [answers(rows, index) for index in range(len(rows))]


# --- sequences ------------------------------------------------------------------------------------


def test_a_pair_by_hand():
    rows = PreferenceRows(Store(([1, 2], [3, 4], 0, 1), ([1, 2], [5], 0, 0)), 6, "pairs")
    assert len(rows) == 1 and rows.responses == 2 and rows.left_out == 0
    row = rows[0]
    np.testing.assert_array_equal(row.responses.tokens, [[1, 2, 3, 4, 0, 0], [1, 2, 5, 0, 0, 0]])
    np.testing.assert_array_equal(row.responses.targets, [[2, 3, 4, 0, 0, 0], [2, 5, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        row.responses.loss_weights, [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        row.responses.segment_ids, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(row.responses.positions, [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(row.scores, [1, 0])
    assert row.margins == 0 and row.reference_logprobs is None
    dtypes = [np.int32, np.int32, np.float32, np.int32, np.int32]
    names = ["tokens", "targets", "loss_weights", "segment_ids", "positions"]
    assert [getattr(row.responses, name).dtype for name in names] == dtypes
    assert row.scores.dtype == row.margins.dtype == np.float32
    with pytest.raises(IndexError):
        rows[1]
    with pytest.raises(IndexError):
        rows.sequences[2]


def test_only_the_answer_of_a_rendered_comparison_counts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(2)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    stores = comparison_stores(
        ExampleConfig(str(path)), make_template("chatml"), BYTES,
        validation_fraction=1e-9, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    rows = PreferenceRows(stores["train"], 16, "pairs")
    assert answers(rows, 0) == [[*b"good", END], [*b"bad", END]]
    prompt = rows[0].responses.tokens[0, :6].tolist()
    assert prompt[:3] == [BOS, USER, ord("p")] and prompt[4:] == [END, ASSISTANT]


# A prompt of four tokens and an answer of three; a pair that fits beside it.
LONG = Store(
    ([1, 2, 3, 4], [5, 6, 7], 0, 1), ([1, 2, 3, 4], [8], 0, 0),
    ([11], [12], 1, 1), ([11], [13], 1, 0),
)  # fmt: skip


@pytest.mark.parametrize(("too_long", "tokens"), [
    ("truncate_left", [3, 4, 5, 6, 7]), ("truncate_right", [1, 2, 3, 4, 5]),
])  # fmt: skip
def test_an_answer_that_is_too_long_is_cut_at_either_end(too_long, tokens):
    rows = PreferenceRows(LONG, 5, "pairs", too_long=too_long)
    assert rows[0].responses.tokens[0].tolist() == tokens
    assert rows.sequences.clipped.too_long == 1 and rows.left_out == 0 and len(rows) == 2


def test_an_answer_that_is_too_long_may_be_left_out_with_its_pair():
    rows = PreferenceRows(LONG, 5, "pairs", too_long="drop")
    assert all_answers(rows) == [[[12], [13]]] and rows.left_out == 1
    rows = PreferenceRows(LONG, 4, "pairs", too_long="truncate_right")  # only prompts are left
    assert all_answers(rows) == [[[12], [13]]] and rows.left_out == 2


def test_an_answer_longer_than_a_row_keeps_what_can_be_predicted():
    sequences = Sequences(LONG, 2, "truncate_left")
    sequences.documents = np.array([[0, 0]])
    assert sequences[0].tokens.tolist() == [6, 7]
    assert sequences[0].loss_weights.tolist() == [1, 0]


# --- arrangements ---------------------------------------------------------------------------------

RANKED = Store(
    ([1], [2], 0, 5.0), ([1], [3], 0, 7.0), ([1], [4], 0, 5.0), ([1], [5], 0, 9.0),
    ([6], [7], 1, 0.5), ([6], [8], 1, 0.25),
    ([9], [10], 2, 1.0), ([9], [11], 2, 1.0),
)  # fmt: skip


def test_every_two_answers_of_different_scores_are_a_pair():
    found = all_answers(PreferenceRows(RANKED, 4, "pairs"))
    # Of four answers with one tie, five pairs; two that tie are none.
    wanted = [[[3], [2]], [[3], [4]], [[5], [2]], [[5], [3]], [[5], [4]], [[7], [8]]]
    assert sorted(found) == sorted(wanted)


def test_answers_that_all_differ_make_k_choose_two_pairs():
    rows = PreferenceRows(Store(*[([1], [10 + i], 0, i) for i in range(6)]), 4, "pairs")
    assert len(rows) == 15
    assert all(better > worse for (better,), (worse,) in all_answers(rows))
    assert len(rows.sequences) == 6  # each is read once, however many pairs it is in


def test_a_group_holds_all_answers_best_first_and_padding():
    rows = PreferenceRows(RANKED, 4, "groups", responses_of([RANKED], "groups"))
    assert all_answers(rows) == [[[5], [3], [2], [4]], [[7], [8], [], []]]
    assert rows[0].scores.tolist() == [9, 7, 5, 5]
    assert rows[1].scores.tolist() == [0.5, 0.25, 0, 0]
    assert not rows[1].responses.segment_ids[2:].any()
    assert rows[1].responses.tokens.shape == (4, 4)


def test_a_group_without_a_better_answer_is_left_out():
    ties = Store(([1], [2], 0, 1), ([1], [3], 0, 1), ([4], [5], 1, 1), ([4], [6], 1, 0))
    assert all_answers(PreferenceRows(ties, 4, "groups")) == [[[5], [6]]]


def test_the_largest_comparison_of_all_splits_decides_k():
    small = Store(([1], [2], 0, 1), ([1], [3], 0, 0))
    assert responses_of([small, RANKED], "groups") == 4
    assert responses_of([small, RANKED], "pairs") == responses_of([RANKED], "unpaired") == 2


UNPAIRED = Store(
    ([1, 2], [3], 0, 1), ([4], [5, 6], 1, 0), ([4], [7], 1, 1), ([8], [9], 2, 0),
)  # fmt: skip


def test_an_unpaired_answer_has_that_to_another_prompt_beside_it():
    rows = PreferenceRows(UNPAIRED, 5, "unpaired")
    tokens = [row.responses.tokens.tolist() for row in map(rows.__getitem__, range(len(rows)))]
    assert tokens == [
        [[1, 2, 3, 0, 0], [1, 2, 5, 6, 0]],
        [[4, 5, 6, 0, 0], [4, 9, 0, 0, 0]],  # not the other answer to its own prompt
        [[4, 7, 0, 0, 0], [4, 9, 0, 0, 0]],
        [[8, 9, 0, 0, 0], [8, 3, 0, 0, 0]],
    ]
    assert [rows[i].scores[0] for i in range(4)] == [1, 0, 1, 0]
    assert all_answers(rows)[0] == [[3], [5, 6]]


def test_of_several_answers_the_best_are_good():
    rows = PreferenceRows(RANKED, 4, "unpaired")
    # The last comparison is a tie, which calls nothing good or bad.
    assert [rows[i].scores[0] for i in range(len(rows))] == [0, 0, 0, 1, 1, 0]


def test_the_best_answer_is_sought_among_those_that_are_left_out_too():
    store = Store(([1], [2, 3, 4, 5], 0, 9), ([1], [6], 0, 2), ([1], [7], 0, 1), ([8], [9], 1, 1))
    rows = PreferenceRows(store, 3, "unpaired", too_long="drop")
    assert [rows[i].scores[0] for i in range(len(rows))] == [0, 0, 1]


def test_answers_labelled_alone_are_not_mismatched_with_those_to_the_same_prompt():
    store = Store(([1], [2], 0, 1), ([1], [3], 1, 0), ([4], [5], 2, 1), ([4], [6], 3, 0))
    rows = PreferenceRows(store, 4, "unpaired")
    assert [rows[i].responses.tokens[1, :2].tolist() for i in range(4)] == [
        [1, 5], [1, 5], [4, 2], [4, 2],
    ]  # fmt: skip


def test_where_all_answer_one_prompt_an_answer_stands_for_its_mismatch():
    rows = PreferenceRows(Store(([1], [2], 0, 1), ([1], [3], 1, 0)), 4, "unpaired")
    assert all_answers(rows) == [[[2], [2]], [[3], [3]]]


@pytest.mark.parametrize("score", [0, 1])
def test_a_single_answer_is_as_good_as_its_label(score):
    rows = PreferenceRows(Store(([1], [2], 0, score), ([3], [4], 1, 1)), 4, "unpaired")
    assert rows[0].scores.tolist() == [score, 0]


def test_a_mismatched_answer_that_is_too_long_loses_the_beginning_of_the_prompt():
    store = Store(([1, 2, 3], [4], 0, 1), ([5], [6, 7, 8], 1, 1))
    rows = PreferenceRows(store, 5, "unpaired")
    assert rows[0].responses.tokens[1].tolist() == [2, 3, 6, 7, 8]
    assert answers(rows, 0) == [[4], [6, 7, 8]]


# --- margins and references -----------------------------------------------------------------------


def test_margins_are_those_of_the_strengths():
    store = Store(*[
        ([i], [50 + 2 * i + worse], i, 1 - worse, strength)
        for i, strength in enumerate((3, 0, -1, 1)) for worse in (0, 1)
    ])  # fmt: skip
    rows = PreferenceRows(store, 4, "pairs", margins=(3.0, 2.0, 1.0, 0.5))
    assert [float(rows[i].margins) for i in range(4)] == [0.5, 3.0, 0.0, 2.0]
    assert rows.strengths.tolist() == [3, 0, -1, 1]
    rows = PreferenceRows(store, 4, "groups", margins=None)
    assert [float(rows[i].margins) for i in range(4)] == [0.0] * 4


@pytest.mark.parametrize("arrangement", ["pairs", "groups", "unpaired"])
def test_every_slot_gets_the_reference_of_its_own_sequence(arrangement):
    rows = PreferenceRows(RANKED, 4, arrangement, responses_of([RANKED], arrangement))
    # A stand-in for a model: a number that the tokens decide.
    numbers = np.array([value(rows.sequences[i]) for i in range(len(rows.sequences))])
    assert len(set(numbers.tolist())) > 5
    rows.attach_reference(numbers)
    for index in range(len(rows)):
        row = rows[index]
        slots = range(rows.responses)
        wanted = [value_of_slot(row.responses, slot) for slot in slots]
        np.testing.assert_allclose(row.reference_logprobs, wanted)
        assert row.reference_logprobs.dtype == np.float32


def value(sequence):
    tokens = sequence.tokens.astype(np.float64)
    return float(tokens @ 100.0 ** np.arange(len(tokens))) if sequence.segment_ids.any() else 0.0


def value_of_slot(responses, slot):
    return value(type(responses)(**{k: v[slot] for k, v in vars(responses).items()}))


def test_the_fingerprint_is_of_what_decides_the_sequences():
    rows = [
        PreferenceRows(RANKED, 4, "pairs"),
        PreferenceRows(RANKED, 4, "pairs", margins=(3.0, 2.0, 1.0, 0.0)),
        PreferenceRows(RANKED, 5, "pairs"),
        PreferenceRows(RANKED, 4, "unpaired"),
        PreferenceRows(RANKED, 4, "pairs", too_long="drop"),
        PreferenceRows(UNPAIRED, 4, "pairs"),
    ]
    assert rows[0].fingerprint == rows[1].fingerprint
    assert len({r.fingerprint for r in rows}) == len(rows) - 1


@pytest.mark.parametrize(("store", "length", "arrangement", "message"), [
    (Store(([1], [2], 0, 1), ([1], [3], 0, 1)), 4, "pairs", "of 4 tokens: 0 of 2"),
    (Store(([1], [2], 0, 1), ([1], [3], 0, 1)), 4, "groups", "of 4 tokens: 0 of 2"),
    (Store(([1], [2], 0, 1), ([1], [3], 0, 1)), 4, "unpaired", "of 4 tokens: 0 of 2"),
    (LONG, 1, "pairs", "source='somewhere' holds nothing to compare.*4 of 4 answers are too long"),
])  # fmt: skip
def test_nothing_to_compare_is_one_clear_line(store, length, arrangement, message):
    with pytest.raises(UserError, match=message):
        PreferenceRows(store, length, arrangement)

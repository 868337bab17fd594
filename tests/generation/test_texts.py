import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.generation import generate as generate_module
from llm_jax.generation.generate import generate, generate_texts, sample_text, stream
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.generation.text import before_stop, pieces, stop_length, whole_text
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig

CONFIG = ModelConfig(vocab_size=320, embed_dim=16, num_layers=1, num_heads=4, num_kv_heads=2,
                     mlp_dim=24, max_length=128)  # fmt: skip
TOKENIZER = ByteTokenizer()
GREEDY = SamplerConfig(temperature=0)
RANDOM = SamplerConfig(temperature=1.5, top_k=20, top_p=0.9)
PROMPTS = [TOKENIZER.encode(text) for text in ("abc", "q", "hello there")]
NEW = 60
SCRIPT = "aé→b🙂!"  # no byte twice


@functools.cache
def make(class_=LanguageModel):
    model = class_(CONFIG)
    rng = np.random.default_rng(0)
    shapes = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    return model, params


class Scripted(LanguageModel):
    """Continues bos, and any beginning of SCRIPT, with the rest of SCRIPT and eos."""

    def apply(self, params, tokens, *args, **kwargs):
        hidden, cache = super().apply(params, tokens, *args, **kwargs)
        return hidden.at[..., 0].set(tokens), cache

    def logits(self, params, hidden):
        script = [TOKENIZER.bos_id, *SCRIPT.encode(), TOKENIZER.eos_id]
        following = jnp.zeros(320, jnp.int32).at[jnp.array(script[:-1])].set(jnp.array(script[1:]))
        return 100 * jax.nn.one_hot(following[hidden[..., 0].astype(jnp.int32)], 320)


def run(prompts=PROMPTS, model=LanguageModel, **settings):
    settings = {"max_new_tokens": NEW, "sampler": RANDOM, "rng": jax.random.key(0)} | settings
    return generate(*make(model), prompts, tokenizer=TOKENIZER, **settings)


def texts(prompts, model=LanguageModel, **settings):
    settings = {"max_new_tokens": NEW, "sampler": RANDOM, "rng": jax.random.key(0)} | settings
    return generate_texts(*make(model), TOKENIZER, prompts, **settings)


def streamed(prompt, model=LanguageModel, **settings):
    settings = {"max_new_tokens": NEW, "sampler": RANDOM, "rng": jax.random.key(0)} | settings
    return list(stream(*make(model), TOKENIZER, prompt, **settings))


def spell(tokens):
    """The bytes of the tokens, without the tokenizer's help."""
    return bytes(token for token in tokens if token < 256)


def plain_runs(tokens, length):
    """Strings of that many ASCII tokens that stand side by side."""
    windows = (tokens[i : i + length] for i in range(len(tokens) - length))
    return [bytes(window).decode() for window in windows if max(window) < 128]


@functools.cache
def free():
    return run()


@functools.cache
def stop_strings():
    """One that the first row alone makes, in three tokens; one of two tokens that the second makes;
    and one that nothing makes."""
    rows = [row.tolist() for row in free().tokens]
    first = next(s for s in plain_runs(rows[0][9:], 3) if s.encode() not in spell(rows[2]))
    second = next(s for s in plain_runs(rows[1][20:], 2) if s.encode() not in spell(rows[2]))
    return (first, second, "never")


@pytest.mark.parametrize("chunk", [1, 4, 7, 32])
def test_a_row_ends_with_the_token_that_completes_a_stop_string(monkeypatch, chunk):
    monkeypatch.setattr(generate_module, "STOP_CHUNK", chunk)
    made = run(stop_strings=stop_strings(), pad_id=300)
    for row, tokens in enumerate(free().tokens.tolist()):
        ends = [
            n for n in range(NEW + 1)
            if any(stop.encode() in spell(tokens[:n]) for stop in stop_strings())
        ]  # fmt: skip
        length = ends[0] if ends else NEW
        assert made.lengths[row] == length
        assert made.stopped[row] == bool(ends)
        assert made.tokens[row].tolist() == tokens[:length] + [300] * (NEW - length)
        logprobs = free().logprobs[row]
        np.testing.assert_allclose(made.logprobs[row, :length], logprobs[:length], atol=1e-5)
        assert (made.logprobs[row, length:] == 0).all()
    assert made.stopped.tolist() == [True, True, False]
    assert 10 < made.lengths[0] < NEW


def test_a_stop_string_does_not_reach_into_the_prompt():
    row = next(row for row, tokens in enumerate(free().tokens) if tokens[0] < 128)
    tokens = free().tokens[row].tolist()
    across = bytes([PROMPTS[row][-1], tokens[0]])
    assert across not in spell(tokens)
    rng = jax.random.fold_in(jax.random.key(0), row)[None]
    made = run(PROMPTS[row : row + 1], rng=rng, stop_strings=(across.decode(),))
    assert made.tokens[0].tolist() == tokens


def test_the_first_of_stop_id_and_stop_string_counts():
    tokens = free().tokens[0].tolist()
    length = int(run(stop_strings=stop_strings()).lengths[0])
    early = next(token for token in tokens[4 : length - 1] if token not in tokens[:4])
    made = run(PROMPTS[:1], stop_strings=stop_strings(), stop_ids=[early])
    assert made.lengths[0] == tokens.index(early) + 1 < length and made.stopped[0]
    # In the chunk in which the string is complete, the row goes on to this one.
    late = next(token for token in tokens[length:] if token not in tokens[:length])
    assert tokens.index(late) < generate_module.STOP_CHUNK
    made = run(PROMPTS[:1], stop_strings=stop_strings(), stop_ids=[late])
    assert made.lengths[0] == length and made.stopped[0]


def test_decoding_ends_when_a_stop_string_has_ended_all_rows(monkeypatch):
    monkeypatch.setattr(generate_module, "STOP_CHUNK", 4)
    counts = []
    advance = generate_module.advance
    monkeypatch.setattr(
        generate_module, "advance", lambda *a, **k: (counts.append(1), advance(*a, **k))[1]
    )
    made = run([[TOKENIZER.bos_id]] * 2, Scripted, sampler=GREEDY, stop_strings=["é→"])
    assert made.lengths.tolist() == [6, 6]
    assert len(counts) == 2


def test_chunks_and_calls_of_one_bucket_share_a_compilation(monkeypatch):
    monkeypatch.setattr(generate_module, "STOP_CHUNK", 4)
    traces = []

    class Traced(LanguageModel):
        def logits(self, *args):
            traces.append(1)
            return super().logits(*args)

    run(PROMPTS, Traced, max_new_tokens=3, stop_strings=["never"])
    once = len(traces)
    run(PROMPTS, Traced, max_new_tokens=20, stop_strings=["never", "ever"])
    assert once and len(traces) == once


@pytest.mark.parametrize(
    ("stops", "length"), [(["cd"], 4), (["bcd", "d"], 4), (["é"], 6), (["dé"], 6), (["x"], None)]
)
def test_stop_length_counts_whole_characters(stops, length):
    tokens = list("abcdé!".encode())
    for known in range(0, (length or len(tokens)) - 1):
        assert stop_length(TOKENIZER, tokens, stops, known) == length


def test_the_text_ends_before_the_stop_string_that_begins_first():
    assert before_stop("abcabc", ["c", "bc"]) == "a"
    assert before_stop("abc", ["x"]) == before_stop("abc", []) == "abc"


def test_whole_text_waits_for_the_last_byte():
    tokens = SCRIPT.encode()
    seen = [whole_text(TOKENIZER, list(tokens[:n])) for n in range(len(tokens) + 1)]
    assert [text for text, _ in itertools.groupby(seen)] == [SCRIPT[:n] for n in range(7)]


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ((), ["a", "é", "→", "b", "🙂", "!"]),
        (("🙂!",), ["a", "é", "→", "b"]),
        (("b?", "x"), ["a", "é", "→", "b🙂", "!"]),
        (("→b🙂?", "b!"), ["a", "é", "→b🙂!"]),
        (("!?",), ["a", "é", "→", "b", "🙂", "!"]),
        (("a",), []),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(monkeypatch, stops, expected):
    monkeypatch.setattr(generate_module, "STREAM_CHUNK", 1)
    settings = {"sampler": GREEDY, "stop_ids": [TOKENIZER.eos_id], "stop_strings": stops}
    assert streamed([TOKENIZER.bos_id], Scripted, **settings) == expected
    assert texts([[TOKENIZER.bos_id]], Scripted, **settings) == ["".join(expected)]


def test_every_way_to_cut_a_text_gives_the_same_pieces_joined():
    tokens = list("aé→ab🙂".encode())
    for cuts in itertools.product([False, True], repeat=len(tokens) - 1):
        ends = [n for n, cut in enumerate(cuts, start=1) if cut]
        parts = list(pieces((whole_text(TOKENIZER, tokens[:n]) for n in [*ends, len(tokens)]),
                            ["ab🙃"]))  # fmt: skip
        assert "".join(parts) == "aé→ab🙂" and "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_stream_is_the_text_of_generate(monkeypatch, chunk, row):
    monkeypatch.setattr(generate_module, "STREAM_CHUNK", chunk)
    for stops, echo in itertools.product([(), stop_strings(), stop_strings()[:1]], [False, True]):
        rng = jax.random.fold_in(jax.random.key(0), row)[None]
        settings = {"stop_strings": stops, "echo": echo, "rng": rng}
        (expected,) = texts([PROMPTS[row]], **settings)
        parts = streamed(PROMPTS[row], **settings)
        assert "".join(parts) == expected
        assert len(parts) > 1 and all(parts)
        tokens = run([PROMPTS[row]], rng=rng, stop_strings=stops)
        made = TOKENIZER.decode(tokens.tokens[0, : tokens.lengths[0]])
        shown = (TOKENIZER.decode(PROMPTS[row]) if echo else "") + before_stop(made, stops)
        assert expected == shown


def test_a_stream_stops_at_a_stop_id(monkeypatch):
    monkeypatch.setattr(generate_module, "STREAM_CHUNK", 2)
    calls = []
    advance = generate_module.advance
    monkeypatch.setattr(
        generate_module, "advance", lambda *a, **k: (calls.append(1), advance(*a, **k))[1]
    )
    parts = streamed([TOKENIZER.bos_id], Scripted, sampler=GREEDY, stop_ids=[TOKENIZER.eos_id])
    assert "".join(parts) == SCRIPT
    assert len(calls) == -(-(len(SCRIPT.encode()) + 1) // 2)


def test_the_prompt_is_shown_with_the_space_after_it():
    class Trimming(ByteTokenizer):
        """Drops the space before the first word of a text, as SentencePiece does."""

        def _decode_ordinary(self, ids):
            return super()._decode_ordinary(ids).removeprefix(" ")

    class Spaced(Scripted):
        def logits(self, params, hidden):
            space = 200 * (hidden[..., :1] == ord("n")) * jax.nn.one_hot(32, 320)
            return super().logits(params, hidden) + space

    model, params = make(Spaced)
    settings = {"max_new_tokens": 1, "sampler": GREEDY, "rng": jax.random.key(0), "echo": True}
    prompt = TOKENIZER.encode("on")
    assert generate_texts(model, params, Trimming(), [prompt], **settings) == ["on "]
    assert "".join(stream(model, params, Trimming(), prompt, **settings)) == "on "


def test_bad_stop_strings_are_refused_at_the_call():
    with pytest.raises(UserError, match="a stop string is empty"):
        run(stop_strings=["a", ""])
    with pytest.raises(TypeError, match="one string"):
        run(stop_strings="ab")
    with pytest.raises(ValueError, match="need the tokenizer"):
        generate(*make(), PROMPTS, max_new_tokens=1, sampler=GREEDY, rng=jax.random.key(0),
                 stop_strings=["a"])  # fmt: skip
    with pytest.raises(UserError, match="a stop string is empty"):
        stream(*make(), TOKENIZER, [1], max_new_tokens=1, sampler=GREEDY, rng=jax.random.key(0),
               stop_strings=[""])  # fmt: skip
    with pytest.raises(UserError, match=r"model\.max_length=128"):
        stream(*make(), TOKENIZER, [1], max_new_tokens=128, sampler=GREEDY, rng=jax.random.key(0))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_changes_nothing(sizes):
    model, params = make()
    mesh = make_mesh(MeshConfig(*sizes))
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.parameter_shardings(mesh, boxed))
        made = generate(
            model, spread, PROMPTS, max_new_tokens=NEW, sampler=RANDOM, rng=jax.random.key(0),
            stop_strings=stop_strings(), tokenizer=TOKENIZER,
        )  # fmt: skip
    alone = run(stop_strings=stop_strings())
    np.testing.assert_array_equal(made.tokens, alone.tokens)
    np.testing.assert_array_equal(made.lengths, alone.lengths)
    np.testing.assert_allclose(made.logprobs, alone.logprobs, atol=1e-4)


def test_sample_text_starts_with_bos_and_shows_the_prompt():
    model, params = make()
    text = sample_text(model, params, TOKENIZER, "Grüße", max_new_tokens=20, sampler=RANDOM, seed=3)
    prompt = [TOKENIZER.bos_id, *TOKENIZER.encode("Grüße")]
    made = generate(
        model, params, [prompt], max_new_tokens=20, sampler=RANDOM, rng=jax.random.key(3),
        stop_ids=(TOKENIZER.eos_id, TOKENIZER.special_ids["end_of_turn"]),
    )  # fmt: skip
    assert text == TOKENIZER.decode([*prompt, *made.tokens[0, : made.lengths[0]]])
    assert text.startswith("Grüße") and len(text) > len("Grüße")


@pytest.mark.parametrize("purpose", ["eos", "end_of_turn"])
def test_sample_text_stops_at_the_end_tokens(purpose):
    model, params = make()
    letter, end = TOKENIZER.encode("a")[0], TOKENIZER.special_ids[purpose]
    # Without layers that add anything, a token's logits are the products of its embedding with all
    # others: bos is followed by "a", "a" by the end, and the end by "b", each all but surely.
    table = np.zeros((320, 16), np.float32)
    table[TOKENIZER.bos_id, 0] = 1
    table[letter, :2] = 30, 31
    table[end, 1] = 100
    table[letter + 1, :2] = -300, 300
    params = jax.tree.map(jnp.zeros_like, params)
    params = {**params, "embedding": table, "final_norm": {"scale": np.ones(16, np.float32)}}
    for prompt in ["", "a"]:
        text = sample_text(
            model, params, TOKENIZER, prompt, max_new_tokens=20, sampler=RANDOM, seed=0
        )
        assert text == "a"

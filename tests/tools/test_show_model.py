"""tools.show loss and attention: their numbers against plain forward passes, and their pages."""

import html.parser
import json
import math

import jax
import numpy as np
import pytest

from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.data.tokenizer_json import train_bpe
from llm_jax.models import ModelConfig
from llm_jax.models.heads import REWARD
from tools.show.__main__ import main as show
from tools.show.attention import summarise
from tools.show.loss import token_texts
from tools.show.windows import WindowedText, cut

BYTES = ByteTokenizer()
BOS = BYTES.special_ids["bos"]
TEXT = 'A <b>&"word"</b> ö\u202e\x1b\n\n\tend!.'


class Page(html.parser.HTMLParser):
    """tokens: the text and the attributes of each span of the text; kinds: of all tags."""

    def __init__(self, page):
        super().__init__()
        self.tokens, self.kinds, self._inside, self._open = [], set(), False, False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.kinds.add(tag)
        self._inside |= tag == "main"
        self._open = self._inside and tag == "span"
        if self._open:
            self.tokens.append(["", dict(attributes)])

    def handle_endtag(self, tag):
        self._inside &= tag != "main"
        self._open = False

    def handle_data(self, data):
        if self._open:
            self.tokens[-1][0] += data


@pytest.fixture(scope="module")
def run(save_run, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("show") / "run", [3], length=32)


@pytest.fixture
def draw(run, tmp_path, capsys):
    """`draw(content)`: the page of a text, and what was printed."""

    def call(content):
        file, output = tmp_path / "a<b>&amp;.txt", tmp_path / "page.html"
        file.write_bytes(content)
        arguments = [f"--workdir={run}", f"--text={file}", f"--output={output}"]
        assert show(["show", "loss", *arguments]) == 0
        return output.read_text(encoding="utf-8"), capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def logprobs(tiny_model, random_params):
    """`logprobs(ids)`: log p of every token at every place but the first, by a plain pass."""
    params = random_params(3)

    @jax.jit
    def compute(params, ids):
        hidden, _ = tiny_model.apply(params, ids[None])
        return jax.nn.log_softmax(tiny_model.logits(params, hidden))[0, :-1]

    return lambda ids: np.asarray(compute(params, np.array(ids, np.int32)), np.float64)


def test_the_page_has_the_models_numbers_and_all_of_the_text(draw, logprobs):
    page, out = draw(TEXT.encode())
    ids = [BOS, *TEXT.encode()]
    found = Page(page).tokens
    assert len(found) == len(ids) == 32
    assert "32 tokens in one window" in out
    expected = logprobs(ids)
    nats = -expected[np.arange(31), ids[1:]]
    for place, (_, attributes) in enumerate(found[1:]):
        order = np.argsort(-expected[place], kind="stable")
        assert int(attributes["data-id"]) == ids[place + 1]
        assert float(attributes["data-nats"]) == pytest.approx(nats[place], abs=2e-3)
        assert int(attributes["data-rank"]) == 1 + list(order).index(ids[place + 1])
        heat = min(1, nats[place] / math.log(BYTES.vocab_size))
        assert float(attributes["style"].removeprefix("--heat:")) == pytest.approx(heat, abs=2e-3)
        top = json.loads(attributes["data-top"])
        assert [name for name, _ in top] == [
            repr(BYTES.decode([id_], skip_special=False)) for id_ in order[:5]
        ]
        share = float(top[0][1].rstrip("%")) / 100
        assert share == pytest.approx(math.exp(expected[place, order[0]]), abs=1e-3)
    mean, bits = nats.mean(), nats.sum() / math.log(2) / 31
    assert f"{mean:.4f} nats a token, perplexity {math.exp(mean):,.2f}, {bits:.4f} bits a" in out


def test_no_text_escapes_into_the_page(draw):
    page, _ = draw(TEXT.encode())
    parsed = Page(page)
    text = "".join(shown for shown, _ in parsed.tokens)
    # Parts of characters are written in hexadecimal, and what commands a terminal as signs.
    wanted = TEXT.replace("\n", "↵\n").replace("\x1b", "\N{SYMBOL FOR ESCAPE}")
    wanted = wanted.replace("ö", r"\xc3\xb6").replace("\u202e", r"\xe2\x80\xae")
    assert text == "<|bos|>" + wanted
    assert "<title>Loss of a&lt;b&gt;&amp;amp;.txt</title>" in page
    assert '<span class="given">&lt;|bos|&gt;</span>' in page
    assert "b" not in parsed.kinds and "http" not in page and "src=" not in page


def test_bytes_that_are_not_utf8_are_told_of(draw):
    page, _ = draw(b"good \xff\xfe bad")
    assert "2 places of the file are no UTF-8" in page
    assert "no UTF-8" not in draw("good \N{REPLACEMENT CHARACTER}".encode())[0]


def test_a_long_text_is_cut_and_each_token_predicted_once(draw, logprobs):
    text = ("abcdefgh" * 9)[:70].encode()
    page, out = draw(text)
    assert "71 tokens are more than the trained length 32: cut into 4 windows" in out
    found = [token for token in Page(page).tokens if "data-nats" in token[1]]
    assert "".join(shown for shown, _ in found).encode() == text
    ids = [BOS, *text]
    for begin, end, fresh in ((0, 32, 1), (16, 48, 32), (32, 64, 48), (39, 71, 64)):
        expected = logprobs(ids[begin:end])
        for place in range(fresh, end):
            attributes = found[place - 1][1]
            nats = -expected[place - begin - 1, ids[place]]
            assert float(attributes["data-nats"]) == pytest.approx(nats, abs=2e-3)
            assert (attributes.get("class") == "cut") == (place in (32, 48, 64))


def test_windows_cover_the_text_and_give_half_a_window_of_context():
    for size in range(2, 40):
        windows = list(cut(range(size), 8))
        fresh = [place for w in windows for place in range(w.fresh, w.begin + len(w.tokens))]
        assert fresh == list(range(1, size))
        assert all(list(w.tokens) == list(range(w.begin, w.begin + 8)) for w in windows[1:])
        assert all(w.fresh - w.begin >= 4 for w in windows[1:])


def test_characters_that_one_token_holds_are_shown_whole():
    tokenizer = train_bpe(["Größe und Größe"] * 9, 300)
    tokens = tokenizer.encode("Größe ĸ")
    text = WindowedText(tokens, 0, "Größe ĸ", 8, [], 0)
    shown = token_texts(text, tokenizer)
    assert "ö" in "".join(shown) and shown[-2:] == [r"\xc4", r"\xb8"]


def test_a_tokenizer_that_rewrites_texts_shows_each_token_alone():
    text = WindowedText([BOS, 97, 195, 98], 1, "A?", 8, [], 0)
    assert token_texts(text, BYTES) == ["<|bos|>", "a", "\N{REPLACEMENT CHARACTER}", "b"]


def test_attention_entropies_of_a_run(run, tmp_path, capsys, tiny_model, random_params):
    (tmp_path / "text.txt").write_text("abc" * 12)
    output = tmp_path / "entropy.png"
    arguments = [f"--workdir={run}", f"--text={tmp_path / 'text.txt'}", f"--output={output}"]
    assert show(["show", "attention", *arguments]) == 0
    out = capsys.readouterr().out
    ids = [BOS, *b"abc" * 12]
    rows = np.array([ids[:32], ids[5:37]], np.int32)
    (entropy_BNT,) = np.asarray(jax.jit(tiny_model.attention_entropy)(random_params(3), rows))
    shares = (entropy_BNT[:, :, 1:] / np.log(np.arange(2, 33))).mean(axis=(0, 2))
    line = next(line for line in out.splitlines() if line.split()[:2] == ["0", "all"]).split()
    assert float(line[2]) == pytest.approx(entropy_BNT[:, :, 1:].mean(), abs=1e-3)
    assert float(line[3]) == pytest.approx(shares.mean(), abs=1e-3)
    lowest = int(np.argmin(shares))
    assert line[4] == f"{lowest}:" and float(line[5]) == pytest.approx(shares[lowest], abs=6e-3)
    assert output.read_bytes().startswith(b"\x89PNG") and output.stat().st_size > 5000


def test_shares_of_even_attention_are_one_with_windows_and_padding():
    config = ModelConfig(num_layers=2, window=3, attention_pattern=("local", "global"))
    keys = np.stack([np.minimum(np.arange(1, 9), 3), np.arange(1, 9)])
    real = np.arange(8) < np.array([[8], [5]])
    entropy = np.broadcast_to(np.log(keys)[:, None, None], (2, 2, 4, 8)).copy()
    entropy[:, 1, :, 5:] = 99.0  # padding, which counts for nothing
    entropy[:, :, :, 0] = 99.0  # a query that sees itself alone has no share
    found = summarise(entropy, real, config)
    np.testing.assert_allclose(found.share, 1.0)
    assert found.share.shape == (2, 4)
    np.testing.assert_allclose(found.by_place[:, 1:], np.log(keys)[:, 1:])
    counted = np.concatenate([np.log(keys[1, 1:]), np.log(keys[1, 1:5])])
    np.testing.assert_allclose(found.nats[1], counted.mean())


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("loss", {"text": "no/such"}, "--text=no/such cannot be read: No such file"),
        ("loss", {"output": "/proc/nowhere/x"}, "--output=/proc/nowhere/x cannot be written"),
        ("loss", {"output": ""}, "--output is required"),
        ("attention", {"text": ""}, "--text is required"),
        ("attention", {"output": "x.jpgg"}, "no known format"),
        ("attention", {"workdir": "no/run"}, "no/run is no run directory"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, command, changes, message):
    (tmp_path / "text.txt").write_text("some text")
    flags = {"workdir": run, "text": tmp_path / "text.txt", "output": tmp_path / "out.html"}
    arguments = [f"--{name}={value}" for name, value in (flags | changes).items()]
    assert show(["show", command, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_text_of_one_token_and_a_reward_model_are_refused(save_run, run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("")
    flags = [f"--text={tmp_path / 'text.txt'}", f"--output={tmp_path / 'x.html'}"]
    assert show(["show", "loss", f"--workdir={run}", *flags]) == 2
    assert "too short" in capsys.readouterr().err
    judge = save_run(tmp_path / "judge", [1], heads=[REWARD], head=True)
    assert show(["show", "loss", f"--workdir={judge}", *flags]) == 2
    assert "is a reward model" in capsys.readouterr().err

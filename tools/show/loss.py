"""Draws how surprised a model is by each token of a text, as one page of HTML.

    python -m tools.show loss --workdir=RUN[@STEP] --text=FILE --output=F.html

A token's colour is its loss, −log p(token) in nats; under the pointer stand its id, its rank and
what the model found likelier. A text that is longer than the rows that the run was trained on is
cut into windows that overlap by half.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from llm_jax.errors import UserError
from tools import pages
from tools.cli import require
from tools.show.text import visible

if TYPE_CHECKING:
    import jax

    from llm_jax.data.tokenizers import Tokenizer
    from llm_jax.models import LanguageModel
    from llm_jax.runs import LoadedRun
    from llm_jax.types import Batch
    from tools.show.windows import WindowedText

ALTERNATIVES = 5
CHUNK = 512  # positions whose logits are held at once
PAGE = "loss.html.jinja"


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "run directory; RUN@STEP for an older checkpoint", flag_values=values
    )
    flags.DEFINE_string("text", None, "text file, read as one document", flag_values=values)
    flags.DEFINE_string("output", None, "page to write, .html", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    require(values, "workdir", "text", "output")
    import jax

    from llm_jax.compilation import use_compilation_cache
    from llm_jax.runs import load_run
    from tools.sampling import check_generates
    from tools.show.windows import read_windows

    use_compilation_cache()
    run = load_run(values.workdir)
    check_generates(run)
    text = read_windows(run, values.text)
    with jax.set_mesh(run.mesh):
        predictions = predict(run, text)
    page = render(run, text, predictions, Path(values.text).name)
    try:
        Path(values.output).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={values.output} cannot be written: {error.strerror}.") from error
    print(text.describe())
    print(summary(text, predictions))
    print(values.output)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model says of each token of a text but the first one.

    nats: float32 [tokens - 1], −log p(token). ranks: int32 [tokens - 1], 1 where no token was
    likelier. likeliest: int32 [tokens - 1, k], and logprobs: float32, theirs, best first.
    """

    nats: np.ndarray
    ranks: np.ndarray
    likeliest: np.ndarray
    logprobs: np.ndarray


def predict(run: LoadedRun, text: WindowedText) -> Predictions:
    """Each token from those before it in its window."""
    import jax

    from tools.show.windows import batches

    compute = jax.jit(functools.partial(_predict_rows, run.model))
    parts = []
    for windows, batch in batches(text):
        found = jax.device_get(compute(run.params, batch))
        for row, window in enumerate(windows):
            places = slice(window.fresh - window.begin - 1, len(window.tokens) - 1)
            parts.append([array[row, places] for array in found])
    return Predictions(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _predict_rows(model: LanguageModel, params: Any, batch: Batch) -> tuple[jax.Array, ...]:
    """The fields of `Predictions` for every target, [batch, time, ...]."""
    import jax
    import jax.numpy as jnp

    from llm_jax.objectives.lm import over_time, pick

    hidden_BTD, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    kernel_DV = model.output_kernel(params)
    alternatives = min(ALTERNATIVES, model.vocab_size)

    def look(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
        logprobs_BCV = jax.nn.log_softmax(model.project(hidden_BCD, kernel_DV))
        own_BC = pick(logprobs_BCV, targets_BC)
        ranks_BC = 1 + jnp.sum(logprobs_BCV > own_BC[..., None], axis=-1)
        best_BCk, likeliest_BCk = jax.lax.top_k(logprobs_BCV, alternatives)
        return -own_BC, ranks_BC, likeliest_BCk, best_BCk

    return over_time(look, CHUNK, hidden_BTD, jnp.asarray(batch.targets))


def summary(text: WindowedText, predictions: Predictions) -> str:
    """Mean loss, perplexity, and bits a byte where the text has bytes, as a sentence."""
    mean = float(predictions.nats.mean())
    size = len(text.text.encode())
    words = f"{mean:.4f} nats a token, perplexity {math.exp(mean):,.2f}"
    if text.start:  # else the first token's bytes are there, and its loss is not
        words += f", {float(predictions.nats.sum()) / math.log(2) / size:.4f} bits a byte"
    return (
        f"{words}; {float(np.mean(predictions.ranks == 1)):.1%} of the tokens were the likeliest."
    )


def render(run: LoadedRun, text: WindowedText, predictions: Predictions, name: str) -> str:
    """The page."""
    highest = math.log(run.tokenizer.vocab_size)
    values = {
        "name": name,
        "run": run.stored.name,
        "notes": [text.describe(), summary(text, predictions), *_warnings(text)],
        "highest": f"{highest:.1f}",
        "vocabulary": f"{run.tokenizer.vocab_size:,}",
        "tokens": list(_tokens(text, predictions, run.tokenizer, highest)),
    }
    return pages.render("tools.show", PAGE, values)


def _warnings(text: WindowedText) -> Iterator[str]:
    if text.replaced:
        yield (
            f"{text.replaced:,} places of the file are no UTF-8; the model was given U+FFFD there."
        )


def _tokens(
    text: WindowedText, predictions: Predictions, tokenizer: Tokenizer, highest: float
) -> Iterator[dict[str, Any]]:
    """What the page shows of each token; the first one is shown without a prediction."""
    names = _Names(tokenizer)
    begins = {window.fresh for window in text.windows[1:]}
    for place, (token, shown) in enumerate(
        zip(text.tokens, token_texts(text, tokenizer), strict=True)
    ):
        entry = {"id": token, "text": shown, "cut": place in begins, "nats": None}
        if place:
            nats = float(predictions.nats[place - 1])
            pairs = zip(
                predictions.likeliest[place - 1], predictions.logprobs[place - 1], strict=True
            )
            entry |= {
                "nats": f"{nats:.3f}",
                "heat": f"{min(1.0, nats / highest):.3f}",
                "rank": int(predictions.ranks[place - 1]),
                "top": [[names[int(id_)], f"{math.exp(p):.1%}"] for id_, p in pairs],
            }
        yield entry


class _Names(dict[int, str]):
    """What stands for a token among others: its text in quotes."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = repr(self._tokenizer.decode([token], skip_special=False))
        return self[token]


def token_texts(text: WindowedText, tokenizer: Tokenizer) -> list[str]:
    """The text of each token; bytes that are no whole character are written in hexadecimal.

    Where the tokenizer keeps texts as they are, a token's bytes are those at its place of the text.
    Where it rewrites them, each token is decoded alone.
    """
    counts = tokenizer.token_bytes()[text.tokens]
    content = text.text.encode("utf-8")
    if int(counts.sum()) != len(content) or tokenizer.decode(text.tokens) != text.text:
        return [visible(tokenizer.decode([token], skip_special=False)) for token in text.tokens]
    shown, end = [], 0
    for token, count in zip(text.tokens, counts.tolist(), strict=True):
        piece, end = content[end : end + count], end + count
        if not count:
            shown.append(tokenizer.decode([token], skip_special=False))
            continue
        try:
            shown.append(visible(piece.decode("utf-8")))
        except UnicodeDecodeError:
            shown.append("".join(f"\\x{byte:02x}" for byte in piece))
    return shown

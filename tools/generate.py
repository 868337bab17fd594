"""Continues a prompt with a trained model.

    python -m tools.generate --workdir=RUN[@STEP] --prompt=TEXT [--temperature=0.8 --top_p=0.95 ...]
    python -m tools.generate --workdir=BASE --expert=TUNED --anti_expert=UNTUNED [--strength=1 ...]

Prints the prompt with its continuation on stdout, and nothing else there; notes go to stderr. A
single continuation appears as it comes. With --chat the prompt is what a user says to a fine-tuned
model, and the answer alone is printed. With an expert and what it was before its tuning, the base
writes as if it had been tuned so, too (proxy tuning); they have one tokenizer.
"""

from __future__ import annotations

import sys

from absl import flags

from llm_jax.errors import UserError
from tools.cli import run_tool
from tools.sampling import (
    Speaker,
    check_text,
    define_speaker_flags,
    load_speaker,
    make_sampler,
)


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    define_speaker_flags(values)
    flags.DEFINE_string(
        "prompt", "", "text to continue; empty = the start of a document", flag_values=values
    )
    flags.DEFINE_boolean(
        "chat", False, "the prompt is a user's turn; print the answer alone", flag_values=values
    )
    flags.DEFINE_integer("max_new_tokens", 128, "tokens to add at most", flag_values=values)
    flags.DEFINE_multi_string(
        "stop", [], "end before this text; may be given several times", flag_values=values
    )
    flags.DEFINE_integer("num_samples", 1, "continuations to make", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    _check(values)
    import jax

    from llm_jax.compilation import use_compilation_cache
    from llm_jax.generation.generate import generate_texts, stream

    sampler = make_sampler(values)
    use_compilation_cache()
    speaker = load_speaker(values)
    prompt, stop_ids = _prompt(speaker, values)
    print(speaker.name, file=sys.stderr)
    settings = {
        "max_new_tokens": values.max_new_tokens,
        "sampler": sampler,
        "rng": jax.random.key(values.seed),
        "stop_ids": stop_ids,
        "stop_strings": values.stop,
        "echo": not values.chat,
    }
    writer = (speaker.model, speaker.params, speaker.tokenizer)
    with jax.set_mesh(speaker.mesh):
        if values.num_samples == 1:
            for piece in stream(*writer, prompt, **settings):
                print(piece, end="", flush=True)
            print()
            return
        prompts = [prompt] * values.num_samples
        texts = generate_texts(*writer, prompts, **settings)
        for number, text in enumerate(texts, start=1):
            print(f"sample {number} of {len(texts)}:", file=sys.stderr, flush=True)
            print(text, flush=True)


def _check(values: flags.FlagValues) -> None:
    """Refuses what can be refused before anything is loaded."""
    if not values.workdir:
        raise UserError("--workdir is required, for example --workdir=runs/pretrain.")
    if values.num_samples < 1:
        raise UserError(f"--num_samples={values.num_samples} must be at least 1.")
    if values.chat and not values.prompt.strip():
        raise UserError("--chat needs a --prompt: what the user says.")
    check_text("prompt", values.prompt)


def _prompt(speaker: Speaker, values: flags.FlagValues) -> tuple[list[int], tuple[int, ...]]:
    """The tokens to continue, and those that end the continuation."""
    from llm_jax.data.examples import Message
    from llm_jax.generation.generate import document_prompt, document_stop_ids

    tokenizer = speaker.tokenizer
    if not values.chat:
        return document_prompt(tokenizer, values.prompt), document_stop_ids(tokenizer)
    template = speaker.chat_template
    tokens = template.render_prompt([Message("user", values.prompt)], (), tokenizer)
    return tokens, template.stop_ids(tokenizer)


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))

"""Where a context ends and its continuation begins, in tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llm_jax.data.tokenizer_base import Place, Tokenizer
from llm_jax.errors import UserError


def encode_pair(
    tokenizer: Tokenizer,
    context: str,
    continuation: str,
    head: Sequence[int] | None = None,
    place: Place = "start",
) -> tuple[list[int], list[int]]:
    """The tokens of a context and of what follows it, as `Subject.loglikelihoods` takes them.

    The rule of the lm-evaluation-harness (`TemplateLM._encode_pair`), so that figures can be
    compared: white space at the end of the context goes over to the continuation, since tokens
    begin with it and do not end with it; then both are encoded as one text, of which the
    continuation is what comes after as many tokens as the context has alone.

    Args:
      head: tokens before the context, and `place` where the context then stands; None: what a
        document begins with.

    Returns:
      Token ids, of both at least one: the context is bos where it would have none.

    Raises:
      UserError: the continuation melts into the context's last token, or is empty.
    """
    stripped = context.rstrip()
    moved = context[len(stripped) :]
    before, whole = tokenizer.encode_batch([stripped, stripped + moved + continuation], place)
    start = tokenizer.document_start if head is None else head
    if len(whole) <= len(before):
        raise UserError(
            f"{continuation[:80]!r} adds no token to what stands before it, so that it has no "
            "likelihood of its own: begin it with a space."
        )
    return [*start, *before] or [tokenizer.bos_id], whole[len(before) :]

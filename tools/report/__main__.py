"""Makes one page of a chain of stages, a sweep, or a single run and the runs it comes from.

    python -m tools.report W [--output=F.html[,F.md]] [--price_per_device_hour=1.2]

W is the workdir of a recipe, a run, or a folder of runs. The page stands for itself: lineage, time
and hardware of each stage, evaluations, curves, samples, and the settings in which the stages or
the runs differ. Without --output it goes to W/report.html. A run that is not finished, or of which
files are missing or damaged, is shown as far as it can be read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.errors import UserError
from tools import pages
from tools.cli import run_tool

if TYPE_CHECKING:
    from tools.report.content import Page

TEMPLATES = {".html": "page.html.jinja", ".md": "page.md.jinja"}


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_list(
        "output", [], "pages to write, .html or .md; absent = report.html in W", flag_values=values
    )
    flags.DEFINE_float(
        "price_per_device_hour",
        None,
        "what a device costs, in any currency; absent = costs are not shown",
        lower_bound=0,
        flag_values=values,
    )
    return values


def main(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        raise UserError("one folder is wanted: python -m tools.report W.")
    folder = Path(arguments[0])
    outputs = [Path(name) for name in values.output] or [folder / "report.html"]
    for output in outputs:
        if output.suffix not in TEMPLATES:
            raise UserError(f"--output={output} must end in .html or .md.")
    import jax

    from tools.report.page import make_page
    from tools.report.reading import read

    # No accelerator is needed, and a run that goes on may hold it.
    jax.config.update("jax_platforms", "cpu")
    page = make_page(read(folder), values.price_per_device_hour)
    for output in outputs:
        _write(output, render(page, TEMPLATES[output.suffix]))
        print(output)


def render(page: Page, template: str) -> str:
    """The page by a template of this package. What is put into HTML is escaped."""
    filters = {"cell": _markdown_cell, "fence": _markdown_fence}
    return pages.render("tools.report", template, {"page": page}, filters)


def _markdown_cell(text: str) -> str:
    """A text that stays in its cell and is not taken for Markdown."""
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split("\n")).replace("\r", " ")


def _markdown_fence(text: str) -> str:
    """A code block, whatever is in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _write(output: Path, text: str) -> None:
    temporary = output.with_name(f".{output.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or "", takes_arguments=True))

"""Pages that stand for themselves, from the templates of a tool and what all pages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def render(
    package: str,
    template: str,
    values: Mapping[str, Any],
    filters: Mapping[str, Callable[..., str]] | None = None,
) -> str:
    """The text of a page. What is put into HTML is escaped.

    Args:
      package: such as "tools.report", whose folder templates/ has the template; those of
        tools/templates can be included.
      template: the name of the file; ".html." in it makes it one of HTML.
      values: what the template names.
      filters: more than Jinja's own.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in (package, "tools")]),
        autoescape=".html." in template,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(values)

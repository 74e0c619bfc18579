"""The templates of the report."""

from __future__ import annotations

from pathlib import Path

import jinja2

_FOLDER = Path(__file__).parent / "templates"


def environment(autoescape: bool) -> jinja2.Environment:
    """Return the environment of the templates, in which a missing name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def template_text(name: str) -> str:
    """Return a file of the templates' folder as it stands."""
    return (_FOLDER / name).read_text(encoding="utf-8")

"""HTML pages that can be sent on as one file: templates beside the modules that fill them, pictures inside the page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_page(template: str, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """The page of `template`, a path in this package, and `values`; a name it uses and nobody gave is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)


def picture_uri(png: bytes) -> str:
    """A PNG file's content as the URI of an image in a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

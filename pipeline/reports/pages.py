"""HTML pages that can be sent on as one file: templates beside the modules that fill them, pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from pipeline import storage
from pipeline.errors import UserError


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


def data_uri(content: bytes, mime: str = "image/png") -> str:
    """A file's content as the URI of an image in a page."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def image_png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def refuse_existing(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Raise UserError where files of these names would be replaced and `overwrite` is not given."""
    for name in names:
        if (folder / name).exists() and not overwrite:
            raise UserError(f"{folder / name} exists; choose another folder or use --overwrite")


def write_files(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Publish the files to `folder`; where they are, in their order."""
    for name, content in contents.items():
        storage.publish_bytes(str(folder / name), content)
    return [folder / name for name in contents]

"""HTML pages from Jinja templates. Each page is one self-contained file, for light and dark colour schemes.

A page's template extends `frame.html` and fills its blocks `style` and `body`. Values are escaped; a missing value is
an error.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

Show = Callable[[Any], Any]
FRAME = Path(__file__).with_name("frame.html")


def render(
    template: Path, filters: Mapping[str, Any] | None = None, show: Show = lambda value: value, **values: Any
) -> str:
    """Render `template` with `values`. `show`: called with each value before it is escaped."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, FRAME.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=show,
    )
    environment.filters |= {"data_url": data_url, **(filters or {})}
    return environment.get_template(template.name).render(values)


def page(title: str, body: str, style: str = "") -> str:
    """Render a page that has no template. `title` is plain text, `body` is HTML and `style` is additional CSS."""
    return render(FRAME, title=title, body=Markup(body), style=Markup(style))


def data_url(png: bytes) -> str:
    """Return a data URL that contains the PNG image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

"""HTML pages from Jinja templates: each page is one file that needs no other, for light and dark screens.

A page's template extends `frame.html` and fills its blocks `style` and `body`. Values are escaped; a missing one is an
error.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FRAME = Path(__file__).with_name("frame.html")


def render(template: Path, **values: Any) -> str:
    """The page that `template` makes of `values`."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, FRAME.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data_url"] = data_url
    return environment.get_template(template.name).render(values)


def page(title: str, body: str, style: str = "") -> str:
    """A page without a template of its own. `title` is plain text, `body` is HTML, `style` is further CSS."""
    return render(FRAME, title=title, body=Markup(body), style=Markup(style))


def data_url(png: bytes) -> str:
    """A URL that holds the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

"""The template of every HTML page that Leviathan writes: one self-contained file, light and dark."""

from __future__ import annotations

import base64
import re
from html import escape


def page(title: str, body: str, style: str = "") -> str:
    """Return a complete page. `title` is plain text, `body` is HTML, `style` is additional CSS."""
    parts = {"TITLE": escape(title), "STYLE": style, "BODY": body}
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], _FRAME)  # one pass: inserted parts are not searched


def data_url(png: bytes) -> str:
    """Return a PNG as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>@TITLE@</title><style>
:root { color-scheme: light dark; --line: #8884; --faint: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2.2rem 0 .5rem; font-size: 1.15rem; }
.when { color: var(--faint); margin-top: 0; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; }
tr { border-bottom: 1px solid var(--line); } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: 1.4rem; } figure { margin: 0; }
.wide { grid-column: 1 / -1; } figcaption { font-weight: 600; margin-bottom: .3rem; }
@media (max-width: 50rem) { figure { grid-column: 1 / -1; } }
img { width: 100%; border-radius: 6px; border: 1px solid var(--line); }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 6px; font-size: 13px; }
.warning { border-left: 4px solid #D55E00; padding: .3rem 1rem; margin: 1rem 0; }
.warning ul { margin: .2rem 0; padding-left: 1.2rem; }
@STYLE@</style></head><body>
@BODY@
</body></html>
"""

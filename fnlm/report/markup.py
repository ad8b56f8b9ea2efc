"""HTML as text: what comes from a run is escaped here, whatever it holds."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence

VOID = {"meta", "link", "br"}


def text(value: object) -> str:
    """Anything as text that is only text; what UTF-8 cannot hold (half a surrogate pair, NUL) becomes U+FFFD."""
    whole = str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")
    return html.escape(whole)


def tag(name: str, /, *inside: str, **attributes: str | bool) -> str:
    """An element: `inside` is markup, attributes are text; `class_` is class, `aria_label` aria-label, False none."""
    words = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(attribute)
        elif value is not False:
            words.append(f'{attribute}="{text(value)}"')
    return f"<{' '.join(words)}>" + ("" if name in VOID else f"{''.join(inside)}</{name}>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = (), caption: str = "") -> str:
    """Rows of markup under a head; the first cell of each row names it. `classes` has one for each row, or is empty."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = []
    for i, (first, *rest) in enumerate(rows):
        kind = classes[i] if classes else ""
        cells = [tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)]
        body.append(tag("tr", *cells, class_=kind or False))
    title = tag("caption", text(caption)) if caption else ""
    return tag("div", tag("table", title, tag("thead", top), tag("tbody", *body)), class_="scroll")


def page_head(title: str, style: str, script: str = "") -> str:
    """The head of a page of its own, whose policy allows this style and this script and nothing else at all."""
    allowed = f"style-src {_digest(style)};" + (f" script-src {_digest(script)};" if script else "")
    policy = f"default-src 'none'; {allowed} base-uri 'none'"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", text(title)),
        tag("style", style),
    )


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"

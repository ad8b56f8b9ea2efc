"""Markdown of untrusted text as harmless HTML: CommonMark with tables, without raw HTML and images."""

from __future__ import annotations

from typing import Any

import nh3
from flask import Blueprint, Response, jsonify, request
from markdown_it import MarkdownIt
from markdown_it.token import Token

from webui.openai import ApiError, parsed, text, wrong

# A parse takes up to 0.1 ms a letter, and holds up the engine meanwhile.
MOST_TEXTS, MOST_LETTERS, MOST_IN_ALL = 200, 20_000, 100_000
WORDS = ("a", "br", "code", "del", "em", "s", "strong")
BLOCKS = ("blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "ul")
TABLES = ("table", "tbody", "td", "th", "thead", "tr")
ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}, "td": {"align"}, "th": {"align"}}
SCHEMES = ("http", "https", "mailto")

blueprint = Blueprint("markdown", __name__)
# An image would be asked for elsewhere as soon as it is shown; raw HTML is shown as it was written.
_parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")


def html(source: str) -> str:
    """The HTML of a text in Markdown. No script, style, image or form is in it, whatever the text says."""
    tokens = _parser.parse(source)
    for token in tokens:
        _align(token)
    made = _parser.renderer.render(tokens, _parser.options, {})
    return nh3.clean(
        made,
        tags={*WORDS, *BLOCKS, *TABLES},
        attributes=ATTRIBUTES,
        attribute_filter=_allowed,
        url_schemes={*SCHEMES},
        link_rel="noopener noreferrer nofollow",
    )


def _allowed(tag: str, name: str, value: str) -> str | None:
    """The value of an attribute; None leaves it out: a link must say by itself where it leads."""
    return value if name != "href" or value.lower().startswith(tuple(f"{s}:" for s in SCHEMES)) else None


def _align(token: Token) -> None:
    """A column's alignment as an attribute: the page's policy allows no styles in HTML."""
    style = token.attrs.pop("style", None)
    if style is not None:
        token.attrSet("align", str(style).removeprefix("text-align:"))


@blueprint.post("/v1/markdown")
def rendered() -> Response:
    """The HTML of each of `texts`, in order."""
    if request.mimetype != "application/json":
        raise ApiError(415, "send the header Content-Type: application/json")
    texts = parsed(request.get_data()).get("texts")
    if not isinstance(texts, list) or len(texts) > MOST_TEXTS:
        raise wrong("texts", f"a list of at most {MOST_TEXTS} strings")
    texts = [_short(t, f"texts[{i}]") for i, t in enumerate(texts)]
    if sum(map(len, texts)) > MOST_IN_ALL:
        raise wrong("texts", f"at most {MOST_IN_ALL:,} characters in all")
    return jsonify({"html": [html(t) for t in texts]})


def _short(value: Any, name: str) -> str:
    found = text(value, name)
    if len(found) > MOST_LETTERS:
        raise wrong(name, f"at most {MOST_LETTERS:,} characters")
    return found

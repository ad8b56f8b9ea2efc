"""Markdown through the server: what comes out can be shown as it is, whatever went in."""

from __future__ import annotations

import time
from html.parser import HTMLParser

import pytest
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from tests.webui.hostile import CORPUS
from webui.markdown import ATTRIBUTES, BLOCKS, MOST_IN_ALL, MOST_LETTERS, MOST_TEXTS, TABLES, WORDS, html

URL = "/v1/markdown"


class Harmless(HTMLParser):
    """Raises for an element, an attribute or an address that may not be."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in {*WORDS, *BLOCKS, *TABLES}, tag
        for name, value in attributes:
            assert name in ATTRIBUTES.get(tag, set()) | ({"rel"} if tag == "a" else set()), (tag, name)
            if name == "href":
                assert str(value).split(":")[0].lower() in ("http", "https", "mailto"), value


def check(source: str) -> str:
    made = html(source)
    parser = Harmless()
    parser.feed(made)
    parser.close()
    return made


@pytest.mark.parametrize("source", CORPUS, ids=range(len(CORPUS)))
def test_what_is_hostile_becomes_harmless(source: str) -> None:
    check(source)
    for around in ("> {}", "- {}", "| {} |\n|-|\n| {} |", "`{}", "[{0}]({0})", "**{}**", "```{}\n{}"):
        check(around.replace("{}", source).replace("{0}", source))


@given(
    st.lists(st.sampled_from([*CORPUS, "\n", "\n\n", "*", "`", "[", "](", ")", "|", "<", ">", "    ", "&"]), max_size=8)
)
def test_and_so_does_any_mixture(parts: list[str]) -> None:
    check("".join(parts))


@pytest.mark.parametrize(
    ("source", "made"),
    [
        ("a\nb", "<p>a<br>\nb</p>\n"),
        ("**a** *b* ~~c~~ `d`", "<p><strong>a</strong> <em>b</em> <s>c</s> <code>d</code></p>\n"),
        ("<b>a</b>", "<p>&lt;b&gt;a&lt;/b&gt;</p>\n"),
        ("3. a", '<ol start="3">\n<li>a</li>\n</ol>\n'),
        ("```py\n<x>\n```", '<pre><code class="language-py">&lt;x&gt;\n</code></pre>\n'),
        ("", ""),
    ],
)
def test_what_it_becomes(source: str, made: str) -> None:
    assert html(source) == made


def test_links_lead_away_without_a_trace() -> None:
    assert (
        html("[a](https://b.example)")
        == '<p><a href="https://b.example" rel="noopener noreferrer nofollow">a</a></p>\n'
    )
    assert "href" not in html("[a](/local) [b](local) [c](//other.example) [d](#e) [f](ftp://g.example)")
    assert "<img" not in html("![a](https://b.example/c.png)")


def test_columns_keep_their_sides() -> None:
    made = html("| a | b |\n|:-|-:|\n| 1 | 2 |")
    assert '<th align="right">b</th>' in made
    assert '<td align="left">1</td>' in made
    assert "style" not in made


def test_over_http(client: FlaskClient) -> None:
    assert client.post(URL, json={"texts": ["*a*", "b"]}).get_json() == {"html": ["<p><em>a</em></p>\n", "<p>b</p>\n"]}
    for wrong in (None, "a", [5], ["a"] * (MOST_TEXTS + 1), ["a" * (MOST_LETTERS + 1)], ["a" * 20_000] * 6):
        response = client.post(URL, json={"texts": wrong})
        assert response.status_code == 400, wrong
        assert response.get_json()["error"]["param"].startswith("texts")
    assert client.post(URL, data="{}", content_type="text/plain").status_code == 415
    assert 5 * MOST_LETTERS <= MOST_IN_ALL


@pytest.mark.parametrize("piece", ["[", "*a ", "`a", "|a", ">", "- ", "&", "<", "[](", "[a]: ", "a**b"])
def test_no_text_takes_long(piece: str) -> None:
    begun = time.process_time()
    html((piece * MOST_LETTERS)[:MOST_LETTERS])
    assert time.process_time() - begun < 5  # 0.5 where it was written

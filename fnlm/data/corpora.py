"""Corpora by name: what stands on the Hugging Face hub or at an address, and how a word of the command line is read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from fnlm.config import did_you_mean

HUB, WEB = "hub:", ("http://", "https://")


class Hub(NamedTuple):
    """A split of a dataset on the hub (or in a folder that is laid out like one).

    `column` has the text; None: conversations in a form that is known, else `text`. `val`: the split to validate with.
    """

    path: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    val: str | None = None
    revision: str | None = None


class Web(NamedTuple):
    """A file to download, of a kind that is read."""

    url: str


CORPORA: dict[str, Hub | Web] = {
    "shakespeare": Web("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
    "tinystories": Hub("roneneldan/TinyStories", column="text", val="validation"),
    "openwebtext": Hub("Skylion007/openwebtext", "plain_text", column="text", revision="refs/convert/parquet"),
    "wikipedia": Hub("wikimedia/wikipedia", "20231101.en", column="text"),
    "c4": Hub("allenai/c4", "en", column="text", val="validation"),
    "c4-news": Hub("allenai/c4", "realnewslike", column="text", val="validation"),
    "fineweb-edu": Hub("HuggingFaceFW/fineweb-edu", "sample-10BT", column="text"),
    "dailydialog": Hub("li2017dailydialog/daily_dialog", val="validation", revision="refs/convert/parquet"),
    "alpaca": Hub("tatsu-lab/alpaca"),
}
DOMAINS = {
    "news": (
        "abc.net.au", "aljazeera.com", "apnews.com", "bbc.co.uk", "bbc.com", "bloomberg.com", "cbsnews.com", "cnbc.com",
        "cnn.com", "dw.com", "economist.com", "ft.com", "independent.co.uk", "latimes.com", "nbcnews.com", "npr.org",
        "nytimes.com", "reuters.com", "theguardian.com", "time.com", "usatoday.com", "washingtonpost.com", "wsj.com",
    )
}  # fmt: skip
"""Lists of hosts by name, for `--domains`."""


def reference(text: str) -> Hub | Web | None:
    """What a word of the command line stands for: `hub:org/name[@revision][:config][:split][#column]`, an address, or
    a name of CORPORA, which takes the same additions: `wikipedia:20231101.de`.

    No config is an empty one, `hub:org/name::validation`. None for a path; a file of such a name goes before it.
    Raises ValueError for `hub:` with nothing behind it, and a name with too much.
    """
    if text.startswith(WEB):
        try:
            urlsplit(text)
        except ValueError as error:
            raise ValueError(f"{text} is no address: {error}") from error
        return Web(text)
    if not text.startswith(HUB) and (Path(text).exists() or _first(text) not in CORPORA):
        return None
    words, _, column = text.removeprefix(HUB).partition("#")
    name, *more = words.split(":")
    name, _, revision = name.partition("@")
    found = Hub(name, revision=revision or None) if text.startswith(HUB) else CORPORA[name]
    if not name or len(more) > 2 or not all(more[1:]) or (isinstance(found, Web) and (more or column or revision)):
        raise ValueError(f"{text} is no dataset; write hub:org/name, with :config, :split and #column as needed")
    if isinstance(found, Web):
        return found
    if more and more[0]:
        found = found._replace(config=more[0], revision=None)
    if len(more) == 2:
        found = found._replace(split=more[1], val=None)
    found = found._replace(revision=revision or found.revision)
    return found._replace(column=column) if column else found


def _first(text: str) -> str:
    return text.partition("#")[0].partition(":")[0].partition("@")[0]


def label(source: Hub | Web) -> str:
    """How a source is called in messages and in the manifest; reads back as itself."""
    if isinstance(source, Web):
        return source.url
    revision = f"@{source.revision}" if source.revision else ""
    column = f"#{source.column}" if source.column else ""
    return f"{HUB}{source.path}{revision}:{source.config or ''}:{source.split}{column}"


def name_of(text: str) -> str | None:
    """What to call the data of a reference: `tinystories`, `name` of `hub:org/name`; None for a path."""
    source = reference(text)
    if source is None:
        return None
    if text.startswith(WEB):
        return Path(text.partition("?")[0]).stem or None
    name = text.removeprefix(HUB).partition("#")[0].partition(":")[0]
    return Path(name.partition("@")[0]).name


def domains_of(words: str) -> tuple[str, ...]:
    """The hosts of `news` or `bbc.com,reuters.com`. Raises ValueError for a word that is neither."""
    found: list[str] = []
    for word in filter(None, words.lower().split(",")):
        if word not in DOMAINS and "." not in word:
            raise ValueError(f"{word!r} is no host{did_you_mean(word, tuple(DOMAINS))}")
        found += DOMAINS.get(word, (word,))
    return tuple(found)

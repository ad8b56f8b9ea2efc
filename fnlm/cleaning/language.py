"""Which language a text is in, by its script and its function words: no model, no library, a few microseconds a line.

A language of Latin script is told by the words that every sentence of it needs; the others by their letters. Texts of a
few words cannot be told, and are kept by whoever asks for one language.
"""

from __future__ import annotations

import re

FEWEST = 20
"""Words (or, without spaces, letters) below which a text is not judged."""
LEAST = 0.08
"""The share of function words, at least, in running text of a language."""
LOOK = 20_000
"""Characters that are looked at: the beginning says what the rest is."""

_WORDS = {
    "en": "the of and to in is that it was for on with as he be at by this had not are but from have they she you his",
    "de": "der die und das ist nicht ein ich zu sie mit auf den es dem für sich auch eine von wird war als dass im des",
    "fr": "le la les et des est une que dans qui du il pas pour sur avec ce elle au sont par mais nous vous cette",
    "es": "el la los y que de en una se del las por con no su para es como más al fue pero está este muy había sus",
    "it": "il di che è la una per non sono con del della si nel anche gli le da dei come più ma alla era questo nella",
    "pt": "o de que e do da em um para não uma os no se na por mais as dos como mas foi ao das tem seu sua com são",
    "nl": "de het een van en in is dat op te zijn met voor niet aan er maar om hij ook als dan naar bij uit werd wordt",
    "sv": "och att det som en på är av för med den till inte har om ett jag men var sig så från vi kan när han hon",
    "da": "og at det som en på er af for med den til ikke har om et jeg men var sig så fra vi kan når han hun blev",
    "pl": "w i na z się nie do to że jest jak o po co za od tak ale ma przez jego dla już był czy było może są",
    "tr": "bir ve bu için de da ile çok daha gibi ne kadar olarak sonra olan ama var her o değil en olduğu ki diye",
    "id": "yang dan di dengan untuk ini itu dari pada tidak dalam akan adalah ke karena oleh juga ada atau telah",
}
function_words = {language: frozenset(words.split()) for language, words in _WORDS.items()}
"""About 25 to 30 of the commonest words of each language of Latin script that is known."""

_SCRIPTS = {
    "ja": r"[\u3040-\u30ff]",
    "zh": r"[\u4e00-\u9fff]",
    "ko": r"[\uac00-\ud7af]",
    "ru": r"[\u0400-\u04ff]",
    "el": r"[\u0370-\u03ff]",
    "ar": r"[\u0600-\u06ff]",
    "he": r"[\u0590-\u05ff]",
    "hi": r"[\u0900-\u097f]",
    "th": r"[\u0e00-\u0e7f]",
}
_LETTERS = {language: re.compile(pattern) for language, pattern in _SCRIPTS.items()}
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_WORD = re.compile(r"[^\W\d_]+")
LANGUAGES = (*_WORDS, *_SCRIPTS)


def language_of(text: str) -> str | None:
    """The code of a text's language, one of `LANGUAGES`; "" for one that is not known, None for too little text."""
    text = text[:LOOK]
    script = _script(text)
    if script is not None:
        return script
    words = _WORD.findall(text.lower())
    if len(words) < FEWEST:
        return None
    shares = {name: sum(word in known for word in words) / len(words) for name, known in function_words.items()}
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] >= LEAST else ""


def _script(text: str) -> str | None:
    """The language whose own script most letters are of; a tenth of kana makes Chinese characters Japanese."""
    counts = {name: len(letters.findall(text)) for name, letters in _LETTERS.items()}
    total = sum(counts.values())
    if total < FEWEST or total <= len(_LATIN.findall(text)):
        return None
    if counts["ja"] >= 0.1 * (counts["ja"] + counts["zh"]) and counts["ja"]:
        return "ja"
    return max(counts, key=counts.__getitem__)

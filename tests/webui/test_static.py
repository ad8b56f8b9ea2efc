"""The page's own files, read as text: nothing from elsewhere, nothing inline, every name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

WEBUI = Path(__file__).parents[2] / "webui"
FILES = sorted([*(WEBUI / "static").iterdir(), *(WEBUI / "templates").iterdir()])
TEXT = {path.name: path.read_text(encoding="utf-8") for path in FILES}
SCRIPTS = {name: text for name, text in TEXT.items() if name.endswith(".js")}
SHEETS = {name: text for name, text in TEXT.items() if name.endswith(".css")}
PAGES = {name: TEXT[f"{name}.html"] + TEXT["icons.html"] + TEXT["key.html"] for name in ("page", "run")}
PAGE = "".join(PAGES.values())

SHARED = {"frame.js", "ui.js"}  # of which the page of a run uses a part


def test_every_file_is_short() -> None:
    assert {name: n for name, text in TEXT.items() if (n := text.count("\n")) > 300} == {}


@pytest.mark.parametrize("name", sorted(TEXT))
def test_nothing_comes_from_elsewhere(name: str) -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", TEXT[name]))
    assert addresses <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_no_text_becomes_markup_or_code(name: str) -> None:
    bad = r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function|setHTML\w*"
    bad += r"|createContextualFragment)\b"
    assert not re.findall(bad, SCRIPTS[name])
    assert not re.findall(r"setAttribute\(\s*[\"'](?:style|on\w+|src)", SCRIPTS[name])


def test_the_page_has_nothing_inline() -> None:
    assert not re.findall(r"\s(?:style|on\w+)=", PAGE)
    assert not re.findall(r"<style|<script>", PAGE)


def test_every_import_is_there() -> None:
    exports = {
        name: set(re.findall(r"^export (?:async )?(?:function\*?|class|const|let) (\w+)", text, re.M))
        for name, text in SCRIPTS.items()
    }
    for name, text in SCRIPTS.items():
        for names, module in re.findall(r"import \{([^}]*)\} from \"\./([\w.]+)\"", text):
            assert {n.strip() for n in names.split(",") if n.strip()} <= exports[module], (name, module)
        for alias, module in re.findall(r"import \* as (\w+) from \"\./([\w.]+)\"", text):
            assert set(re.findall(rf"(?<![\w./]){alias}\.(\w+)", text)) <= exports[module], (name, module)


def scripts_of(page: str) -> set[str]:
    """The scripts that a page loads, and what they import."""
    todo = re.findall(r"filename='([\w.]+\.js)'", TEXT[f"{page}.html"])
    found: set[str] = set()
    while todo:
        name = todo.pop()
        todo += [] if name in found else re.findall(r"from \"\./([\w.]+)\"", SCRIPTS[name])
        found.add(name)
    return found


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_id_and_icon_is_there(page: str) -> None:
    ids = re.findall(r"\bid=\"([\w-]+)\"", PAGES[page])
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"href=\"#([\w-]+)\"", PAGES[page])) <= set(ids)
    assert set(re.findall(r"(?:for|aria-labelledby|aria-controls)=\"([\w-]+)", PAGES[page])) <= set(ids)
    for name in scripts_of(page) - (SHARED if page == "run" else set()):
        assert set(re.findall(r"byId\(\"([\w-]+)\"\)", SCRIPTS[name])) <= set(ids), name
        assert {f"i-{i}" for i in re.findall(r"iconButton\(\"([\w-]+)\"", SCRIPTS[name])} <= set(ids), name


def test_every_script_is_used() -> None:
    assert scripts_of("page") | scripts_of("run") == set(SCRIPTS)


def test_every_colour_has_a_dark_one() -> None:
    named = re.compile(r"^  (--[\w-]+): (?:#|0 )", re.M)
    assert set(named.findall(SHEETS["style.css"])) == set(named.findall(SHEETS["dark.css"]))
    used = {v for text in SHEETS.values() for v in re.findall(r"var\((--[\w-]+)\)", text)}
    assert used <= set(re.findall(r"(--[\w-]+):", SHEETS["style.css"]))


def contrast(a: str, b: str) -> float:
    """WCAG 2.1's ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("sheet", ["style.css", "dark.css"])
def test_every_text_can_be_read(sheet: str) -> None:
    found = re.findall(r"^  --([\w-]+): (#[0-9a-f]{3,6});", SHEETS[sheet], re.M)
    colours = {k: v if len(v) == 7 else "#" + "".join(c * 2 for c in v[1:]) for k, v in found}
    grounds = ["ground", "panel", "raised", "mine", "hover", "code", *(f"surprise-{i}" for i in range(1, 6))]
    assert {g: r for g in grounds if (r := contrast(colours["text"], colours[g])) < 7} == {}
    assert {g: r for g in grounds[:6] if (r := contrast(colours["soft"], colours[g])) < 4.5} == {}
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    assert contrast(colours["bad"], colours["ground"]) >= 4.5

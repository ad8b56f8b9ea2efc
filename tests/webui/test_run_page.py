"""The page of a run in a real browser: it grows with the run, asks its checkpoints, and runs no word of theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fnlm.track import JsonLines
from tests.webui import browser
from tests.webui.browser import Browser
from tests.webui.echo import Echo, serving
from tests.webui.hostile import CORPUS, SCAN, WATCH
from tests.webui.running import begin, learn, tell, write
from tests.webui.tiny import save
from webui.app import create_app
from webui.engine import Engine
from webui.follow import Runs
from webui.models import Models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.found() is None, reason="no Chromium here"),
]
ANSWERS = "[...document.querySelectorAll('#answers li')]"


def text(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)}).textContent"


class Page:
    """The page of one run, and what a hand does there."""

    def __init__(self, page: Browser, run: Path, url: str):
        self.page, self.run, self.url, self.js, self.wait = page, run, url, page.js, page.wait

    def load(self) -> None:
        self.page.do("Page.navigate", url=f"{self.url}run?name={self.run.name}")
        self.wait("document.readyState === 'complete' && document.querySelector('#which').textContent")

    def slide(self, selector: str, to: int) -> None:
        self.js(f"document.querySelector('{selector}').focus()")
        self.page.key("Home", 36)
        for _ in range(to):
            self.page.key("ArrowRight", 39)

    def ask(self, words: str) -> None:
        count = self.js(f"{ANSWERS}.length")
        self.js("document.querySelector('#text').value = ''")
        self.js("document.querySelector('#text').focus()")
        self.page.type(words)
        self.page.key("Enter", 13, "\r")
        self.answered(count + 1)

    def answered(self, count: int) -> None:
        self.wait(f"{ANSWERS}.length === {count} && document.querySelector('#stop').hidden")


@pytest.fixture
def page(opened: Browser, tmp_path: Path) -> Iterator[Page]:
    run = begin(tmp_path / "runs" / "run")
    engine = Engine(Models([tmp_path / "runs"]), streams=4).start()
    opened.size(1280, 900)
    opened.colours("light")
    opened.said.clear()
    with serving(create_app(engine)) as url:
        found = Page(opened, run, url)
        found.load()
        opened.js("localStorage.clear()")
        yield found
        opened.do("Page.navigate", url="about:blank")
        assert not opened.said, opened.said
    engine.stop()


def test_it_goes_on_with_the_run(page: Page) -> None:
    assert page.js(text("#state")) == "running"
    assert page.js(text("#where")).startswith("step 100 of 200 · ")
    titles = "[...document.querySelectorAll('figcaption b')].map(n => n.textContent)"
    assert page.js(titles) == ["Loss", "Learning rate", "Gradient norm", "Throughput"]
    assert page.js(text("#sample-step")) == "step 100"
    page.wait(text("#sample-text"))
    assert page.js("[...document.querySelectorAll('#sample-text .words')].map(n => n.textContent)") == [
        "Once upon step 100",
        "Twice at 100",
    ]
    page.js("document.querySelector('.chart details').open = true")
    learn(page.run, range(110, 160, 10))
    tell(page.run, step=150, event="spike", message="loss 9 is above 5")
    write(page.run, 150, "later")
    with (page.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 160, "tor')
    page.wait(f"{text('#where')}.startsWith('step 150 of 200')")
    assert page.js(text("#events td:nth-child(2)")) == "spike loss 9 is above 5"
    assert page.js("document.querySelector('.chart details').open")
    page.wait(f"{text('#sample-text')} === 'later'")
    page.slide("#sample", 0)
    page.wait(f"{text('#sample-text')}.startsWith('Once upon step 50')")
    JsonLines.truncate(page.run / "metrics.jsonl", 100)  # a rollback
    tell(page.run, step=100, event="rollback", message="back to step 100")
    page.wait(f"{text('#where')}.startsWith('step 100 of 200')")
    assert page.js(text("#events td:nth-child(2)")) == "rollback back to step 100"
    assert page.js(text("#sample-step")) == "step 50"  # the reader's choice stays
    learn(page.run, range(110, 210, 10))
    tell(page.run, step=200, event="finished", message="finished after 200 steps")
    page.wait(f"{text('#state')} === 'finished'")
    assert page.js("document.querySelector('#progress').value") == 200


def test_a_run_that_is_not_there(page: Page) -> None:
    begin(page.run.parent / "other")
    page.page.do("Page.navigate", url=f"{page.url}run?name=nothing")
    page.wait("document.querySelector('#notice')?.textContent === 'There is no run nothing; choose another above.'")
    assert page.js("document.querySelector('#whole').hidden")
    page.wait("document.querySelectorAll('#runs option').length === 2")
    page.js("(n => { n.value = 'other'; n.dispatchEvent(new Event('change')); })(document.querySelector('#runs'))")
    page.wait("document.querySelector('.chart') && !document.querySelector('#whole').hidden")
    assert page.js("location.search") == "?name=other"
    assert page.js("document.querySelector('#notice').hidden")
    page.page.said = [s for s in page.page.said if "404" not in json.dumps(s)]  # the browser's own word on it


def test_the_numbers_under_the_pointer_stay_while_curves_grow(page: Page) -> None:
    box = page.js(
        "(r => [r.left + r.width / 2, r.top + 20])(document.querySelector('.field[data-low]').getBoundingClientRect())"
    )
    page.page.do("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert page.js(text(".tip .at")) == "step 50"
    assert "training" in page.js(text(".tip"))
    learn(page.run, range(110, 210, 10))
    page.wait(f"{text('.tip .at')} === 'step 100'")
    assert not page.js("document.querySelector('.tip').hidden")


def test_nothing_is_asked_for_while_nobody_looks(page: Page) -> None:
    count = "performance.getEntriesByType('resource').filter(e => e.name.includes('/v1/run?')).length"
    page.js("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    page.js("document.dispatchEvent(new Event('visibilitychange'))")
    before = page.js(count)
    page.js("new Promise(done => setTimeout(done, 2500))")
    assert page.js(count) == before
    page.js("Object.defineProperty(document, 'hidden', {value: false, configurable: true})")
    page.js("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait(f"{count} > {before}")


def test_checkpoints_answer(page: Page) -> None:
    head = f"{ANSWERS}[0].querySelector('.answer-head').textContent"
    assert page.js(text("#which")) == "step 100 · loss 2.000 · the newest, the best"
    page.ask("abc")
    assert page.js(head) == "step 100 · seed 1"
    page.slide("#checkpoint", 0)
    assert page.js(text("#which")) == "step 50 · loss 2.500"
    assert page.js("document.querySelector('#checkpoint').getAttribute('aria-valuetext')") == "step 50 · loss 2.500"
    page.ask("abc")
    assert page.js(head) == "step 50 · seed 1"
    first, second = page.js(f"{ANSWERS}.map(n => n.querySelector('.words').textContent)")
    assert first != second
    page.js("document.querySelector('#again').click()")
    save(page.run, "text", step=150, seed=150)
    shutil.rmtree(page.run / "checkpoints" / "00000050.params")  # as retention does
    page.answered(3)
    assert page.js(head) == "step 150 · seed 1"  # what was chosen is gone: the newest answers, by itself
    assert page.js("document.querySelector('#checkpoint').max") == "1"
    page.js(f"{ANSWERS}[0].querySelector('.token').click()")
    assert "bits" in page.js(text("#thought"))


def test_from_a_checkpoint_to_the_chat_page_and_back(page: Page) -> None:
    page.slide("#checkpoint", 0)
    page.page.click("#side-by-side")
    page.wait("document.querySelector('#rival')?.textContent === 'run@newest'")
    assert page.js(text("#model-name")) == "run@50"
    page.js("document.querySelector('#think').click()")
    page.js("document.querySelector('#text').focus()")
    page.page.type("abc")
    page.page.key("Enter", 13, "\r")
    page.wait("document.querySelectorAll('.pair .tools').length === 2")
    figures = page.js("[...document.querySelectorAll('.pair .figures')].map(n => n.textContent.split(' · '))")
    assert [f[-1] for f in figures] == [figures[0][-1]] * 2  # one seed
    assert sorted(part for f in figures for part in f if part.startswith("step")) == ["step 100", "step 50"]
    page.page.click("#model-button")
    names = "[...document.querySelectorAll('#picker .choice-name')].map(n => n.textContent)"
    assert page.js(names) == ["run", "run@newest", "run@100", "run@50"]
    page.page.key("Escape", 27)
    shutil.rmtree(page.run / "checkpoints" / "00000050.params")
    page.js("window.dispatchEvent(new Event('focus'))")
    page.wait(f"{text('#model-name')} === 'run'")
    assert page.js(text("#notice")) == "run@50 is not there any more; run answers."
    page.page.click("#run-link")
    page.wait("document.querySelector('#which')?.textContent")
    assert page.js(text("#run-name")) == "run"


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (820, "light")])
def test_nothing_sticks_out(page: Page, width: int, scheme: str) -> None:
    page.page.size(width, 740, mobile=True)
    page.page.colours(scheme)
    write(page.run, 150, "w" * 300 + "⏵" + "v" * 300)
    tell(page.run, step=100, event="stopped", message="m" * 300)
    page.load()
    page.ask("q" * 40)
    assert page.js("document.documentElement.scrollWidth") == width
    assert page.js("document.querySelector('.sheet').scrollWidth") <= width
    sizes = (
        "[...document.querySelectorAll('input, textarea, select')].map(n => parseFloat(getComputedStyle(n).fontSize))"
    )
    assert page.js(f"Math.min(...{sizes})") >= 16


def test_it_is_read_out(page: Page) -> None:
    page.ask("abc")
    page.page.do("Accessibility.enable")
    nodes = [n for n in page.page.do("Accessibility.getFullAXTree")["nodes"] if not n.get("ignored")]
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes]
    roles = {
        "button",
        "textbox",
        "spinbutton",
        "slider",
        "checkbox",
        "link",
        "progressbar",
        "progressIndicator",
        "image",
    }
    assert not [role for role, name in named if role in roles and not name]
    assert {name for role, name in named if role == "slider"} == {"Checkpoint", "What it wrote as it learnt"}
    charts = [name for role, name in named if role in ("image", "img") and "over steps" in name]
    assert len(charts) == 4
    assert charts[0].startswith("Loss over steps. training: from 4.167 at step 10, to 1.667 at step 100")
    assert {name for role, name in named if role == "heading"} >= {"run", "Ask it", "Samples", "Events"}
    values = [n["value"]["value"] for n in nodes if n["role"]["value"] == "slider" for p in [n] if "value" in p]
    assert len(values) == 2


def test_a_key_is_asked_for(opened: Browser, tmp_path: Path) -> None:
    run = begin(tmp_path / "runs" / "run")
    engine = Engine(Models([tmp_path / "runs"]), streams=2).start()
    with serving(create_app(engine, api_key="sesame", runs=Runs(engine.models, run))) as url:
        opened.do("Page.navigate", url=f"{url}run?name=run#key=sesame")
        opened.wait("document.readyState === 'complete' && document.querySelector('.chart')")
        assert opened.js("location.hash + location.search") == "?name=run"
        opened.js("localStorage.clear()")
        opened.do("Page.reload")
        opened.wait("document.readyState === 'complete' && document.querySelector('#key-dialog')?.open")
        opened.type("sesame")
        opened.key("Enter", 13, "\r")
        opened.wait("document.querySelector('.chart')")
        opened.js("localStorage.clear()")
        opened.do("Page.navigate", url="about:blank")
    engine.stop()


def test_nothing_untrusted_runs(opened: Browser, tmp_path: Path) -> None:
    run = begin(tmp_path / "runs" / "run", "chat")
    engine = Engine(Models([tmp_path / "runs"]), streams=4).start()
    engine.models.paths = lambda: dict.fromkeys(CORPUS, run)  # type: ignore[method-assign]
    echo = Echo(reply=lambda body: [str(body["messages"][-1]["content"])])
    opened.do("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
    opened.said.clear()
    with serving(echo.before(create_app(engine))) as url:
        opened.do("Page.navigate", url=f"{url}run")
        opened.wait("document.readyState === 'complete' && document.querySelector('#which').textContent")
        for i, words in enumerate(CORPUS):
            if i % 10 == 0:
                write(run, 100, f"\n{'-' * 40}\n".join(f"{w}⏵{w}" for w in CORPUS[i : i + 10]))
                (run / "metrics.jsonl").unlink()
                learn(run, range(10, 60, 10), **{f"health/param_norm/{w}": 1.0 for w in CORPUS[i : i + 10]})
                for other in CORPUS[i : i + 10]:
                    tell(run, step=60, event=other, message=other)
            pick = f"(n => {{ n.selectedIndex = {i}; n.dispatchEvent(new Event('change')); }})"
            opened.js(f"{pick}(document.querySelector('#runs'))")
            opened.wait(f"{text('#run-name')} === {json.dumps(words)} && document.querySelector('.chart')")
            opened.js(f"document.querySelector('#text').value = {json.dumps(words)}")
            opened.js("document.querySelector('#send').click()")
            opened.wait(f"{ANSWERS}.length && {ANSWERS}[0].querySelector('.answer-head').textContent !== '…'")
            opened.wait("document.querySelector('#stop').hidden")
            assert opened.js(SCAN) == [], words
        assert opened.js("ran") == []
        assert opened.js("document.querySelectorAll('#events td').length") > 10
        opened.do("Page.navigate", url="about:blank")
    engine.stop()
    assert not opened.said, opened.said

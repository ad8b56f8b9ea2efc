"""A tiny plain model and a tiny chat model as runs, an engine over them, and a client of the app around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from tests.webui import browser
from tests.webui.browser import Browser
from tests.webui.tiny import save
from webui.app import create_app
from webui.engine import Engine
from webui.models import Models


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save(folder / "plain", "text")
    save(folder / "talk", "chat", step=9, seed=1)
    return folder


@pytest.fixture(scope="session")
def engine(runs: Path) -> Iterator[Engine]:
    running = Engine(Models([runs]), streams=4).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = browser.found()
    assert program is not None
    page = Browser(program, tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def client(engine: Engine) -> FlaskClient:
    return create_app(engine).test_client()

"""How far the encoding of a preparation has come: what an interrupted one goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fnlm.data.encode import Survey
from fnlm.data.gather import replace
from fnlm.data.sink import Sink

FILE = "encoded.json"


class Encoded:
    """`items` of the documents that `found` surveyed are in the sinks; nothing is noted without a survey.

    `begun`: an interrupted preparation has noted how far it came.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / FILE
        self.begun = self._file.exists()
        at: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8")) if self.begun else {}
        self.items: int = at.get("items", 0)
        self._splits: dict[str, dict[str, int]] = at.get("splits", {})
        self.found: Survey | None = None
        if self.begun:
            self.found = Survey(*at["found"])._replace(long=tuple((i, n) for i, n in at["found"][-1]))

    def counts(self, split: str) -> dict[str, int] | None:
        """What a split had."""
        return self._splits.get(split)

    def commit(self, sinks: dict[str, Sink]) -> None:
        """Bring to disk what the sinks have, and note it."""
        if self.found is not None:
            splits = {name: sink.commit() for name, sink in sinks.items()}
            replace(self._file, {"items": self.items, "found": self.found, "splits": splits})

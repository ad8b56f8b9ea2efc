"""What the server counts, in the text that Prometheus reads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
TYPE = "text/plain; version=0.0.4; charset=utf-8"
HELP = {
    "fnlm_requests_total": "Requests answered, by route and status.",
    "fnlm_replies_total": "Replies that ended, by reason.",
    "fnlm_prompt_tokens_total": "Tokens of prompts whose reply began.",
    "fnlm_prompt_tokens_reused_total": "Of these, those that a cache still held.",
    "fnlm_tokens_total": "Tokens written.",
    "fnlm_drafted_tokens_total": "Tokens drafted, where replies are speculated.",
    "fnlm_accepted_tokens_total": "Of these, those that the model would have said: divided by it, the acceptance rate.",
    "fnlm_step_seconds_total": "Seconds in which tokens were written; tokens divided by it is the speed.",
}


class Metrics:
    """Counters that any thread may raise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: Counter[float] = Counter()
        self._waited = 0.0

    def add(self, name: str, n: float = 1, **labels: str | int) -> None:
        """Raise a counter of HELP; labels are of ours, not a user's words."""
        inner = ",".join(f'{k}="{v}"' for k, v in labels.items())
        with self._lock:
            self._counts[name, f"{{{inner}}}" if inner else ""] += n  # type: ignore[assignment]

    def first(self, seconds: float, prompt: int, reused: int) -> None:
        """The first token of a reply, that many seconds after it was asked for."""
        self.add("fnlm_prompt_tokens_total", prompt)
        self.add("fnlm_prompt_tokens_reused_total", reused)
        with self._lock:
            self._waited += seconds
            self._first[next((b for b in BUCKETS if seconds <= b), float("inf"))] += 1

    def text(self, gauges: Mapping[str, tuple[float, str]]) -> str:
        """All of it, with gauges {name: (value, help)} as they are now."""
        return "\n".join([*self._lines(gauges), ""])

    def _lines(self, gauges: Mapping[str, tuple[float, str]]) -> Iterator[str]:
        with self._lock:
            counts, first, waited = Counter(self._counts), Counter(self._first), self._waited
        for name, help_ in HELP.items():
            yield from (f"# HELP {name} {help_}", f"# TYPE {name} counter")
            found = sorted((labels, n) for (key, labels), n in counts.items() if key == name)
            yield from (f"{name}{labels} {n:g}" if n < 1e6 else f"{name}{labels} {n:.0f}" for labels, n in found)
        name, total = "fnlm_time_to_first_token_seconds", 0
        yield from (f"# HELP {name} From a request to its first token, the queue included.", f"# TYPE {name} histogram")
        for bucket in (*BUCKETS, float("inf")):
            total += first[bucket]
            yield f'{name}_bucket{{le="{"+Inf" if bucket == float("inf") else f"{bucket:g}"}"}} {total}'
        yield from (f"{name}_sum {waited:.6f}", f"{name}_count {total}")
        for name, (value, help_) in gauges.items():
            yield from (f"# HELP {name} {help_}", f"# TYPE {name} gauge", f"{name} {value:g}")

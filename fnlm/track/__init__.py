"""Where a run's numbers go: `metrics.jsonl` always, the terminal, and services by choice, which never stop training."""

from fnlm.track.lines import JsonLines
from fnlm.track.progress import Progress
from fnlm.track.services import TRACKERS, Many, Tracker, open_trackers, require_trackers

__all__ = ["TRACKERS", "JsonLines", "Many", "Progress", "Tracker", "open_trackers", "require_trackers"]

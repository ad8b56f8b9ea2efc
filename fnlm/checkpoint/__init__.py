"""Checkpoints: the whole state of a run on disk, complete or not there at all; docs/checkpoints.md says how.

>>> path = save("runs/demo/checkpoints", state, config={"model": asdict(cfg)}, extra={"loss": 1.2})
>>> state, extra = restore(newest_good("runs/demo/checkpoints"), like=init_state(init_params(cfg, key), optimizer))
"""

from fnlm.checkpoint.files import CheckpointError, Misfit, SaveFailed
from fnlm.checkpoint.layout import best, describe, is_any, mark_best, newest_good, older, resolve, verify
from fnlm.checkpoint.part_saver import PartSaver
from fnlm.checkpoint.read import fitted, load_params, restore
from fnlm.checkpoint.saver import Saver
from fnlm.checkpoint.write import save

__all__ = [
    "CheckpointError",
    "Misfit",
    "PartSaver",
    "SaveFailed",
    "Saver",
    "best",
    "describe",
    "fitted",
    "is_any",
    "load_params",
    "mark_best",
    "newest_good",
    "older",
    "resolve",
    "restore",
    "save",
    "verify",
]

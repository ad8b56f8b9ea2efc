"""The run: `fit` trains, watches, saves and evaluates a `Job`; `RunConfig` says how often, and what to guard."""

from fnlm.loop.folder import claim, described, read_config, resumable, settings_of
from fnlm.loop.guard import Guard
from fnlm.loop.job import Job, Outcome, keys_of
from fnlm.loop.memory import DoesNotFit
from fnlm.loop.run import fit, start
from fnlm.loop.settings import KINDS, RunConfig, Settings
from fnlm.loop.signals import Stop
from fnlm.loop.together import for_world, mesh_of, simulated

__all__ = [
    "KINDS",
    "DoesNotFit",
    "Guard",
    "Job",
    "Outcome",
    "RunConfig",
    "Settings",
    "Stop",
    "claim",
    "described",
    "fit",
    "for_world",
    "keys_of",
    "mesh_of",
    "read_config",
    "resumable",
    "settings_of",
    "simulated",
    "start",
]

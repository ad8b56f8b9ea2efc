"""A run from its settings to its end; what happens between two steps is in `session`."""

from __future__ import annotations

import contextlib
import sys

from fnlm.checkpoint import Misfit
from fnlm.environment import environment, memory_available
from fnlm.loop import folder as files
from fnlm.loop import memory
from fnlm.loop.job import Begin, Job, Outcome, parted
from fnlm.loop.misfit import explained
from fnlm.loop.rank import Together
from fnlm.loop.session import Session
from fnlm.loop.signals import Stop
from fnlm.loop.team import Alone
from fnlm.sharding import Mesh
from fnlm.track import JsonLines, Many, Progress, Tracker


def fit(job: Job, trackers: Tracker, progress: Progress, mesh: Mesh | None = None, stop: Stop | None = None) -> Outcome:
    """Train until the last step, an early stop, SIGINT or SIGTERM (saved first), or the guard's end.

    `mesh`: this is one rank of several, and all call it with the same job; only rank 0 logs and writes. `stop` is that
    of a caller who catches the signals, as threads cannot.
    Raises DoesNotFit where memory runs out, with what would fit; CheckpointError where a checkpoint cannot be used or
    written; DataError for data that cannot be. What was saved before stays.
    """
    job = parted(job)
    team = Alone(job) if mesh is None or mesh.world == 1 else Together(job, mesh)
    try:
        begin, metrics = team.begin(), job.folder / files.METRICS
    except Misfit as error:
        raise explained(job, error) from error
    job = team.job
    log = Many([trackers])
    if team.lead:
        files.write(job.folder, job.config, environment(sys.argv))
        if job.resume is not None:
            JsonLines.truncate(metrics, int(begin.state.step))
        log = Many([JsonLines(metrics), trackers])
    team.share(job.folder / files.CONFIG)
    saver = team.saver()
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(Stop(progress.say))
        stack.enter_context(saver)
        try:
            return Session(team, begin, team.saved_by(saver), stop, Many([log, progress]), progress).run()
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            raise memory.DoesNotFit(memory.advice(job.cfg, job.train, memory_available(), team.crew)) from error
        finally:
            log.close()


def start(job: Job) -> Begin:
    """The state that a run of one process begins with; see `Alone.begin`."""
    return Alone(job).begin()

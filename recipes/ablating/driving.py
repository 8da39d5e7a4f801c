"""Runs the trials of a plan until none is left. A slot that is free takes the next one at once."""

import time

from pretraining.launching import StopSignals

from .watching import Table

EVERY = 0.2  # seconds between looks at the trials


def drive(plan, engine, table=None):
    """Runs trials until all have ended, or until a signal asks to stop.

    Args:
        plan: a `Plan`.
        engine: where they run.
        table: shows how far they are; None: on this terminal.

    Returns:
        The signal that ended it early, or None.
    """
    signals, table = StopSignals(), table or Table(plan)
    slots = [None] * plan.sweep.engine.slots
    left = set()  # what was stopped by somebody else: it goes on with the next driver
    waiting, stopping = plan.open(), None
    try:
        while True:
            busy = {trial.hash for trial, _ in filter(None, slots)}
            for slot, held in enumerate(slots):
                free = [t for t in waiting if t.hash not in busy | left]
                if held is None and free and not stopping:
                    free[0].write_recipe()
                    slots[slot] = free[0], engine.start(free[0], slot)
                    busy.add(free[0].hash)
            if not any(slots):
                return stopping
            table.draw([trial for trial, _ in filter(None, slots)])
            wake = time.monotonic() + EVERY
            while time.monotonic() < wake and not signals.received:
                time.sleep(EVERY / 10)
            for slot, (trial, job) in [(n, held) for n, held in enumerate(slots) if held]:
                code = job.poll()
                if code is not None:
                    slots[slot] = None
                    left |= {trial.hash} if trial.marker() is None else set()
                    waiting = plan.open()
                    table.ended(trial, code)
            if signals.received:
                if not stopping:
                    table.say(f"{signals.received.name}: trials save and end")
                stopping, signals.received = signals.received, None
                for _, job in filter(None, slots):
                    job.stop()
    finally:
        table.close()

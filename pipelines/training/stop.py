"""Notice before the end: Slurm, spot instances and container hosts send a signal some 30 s before they kill."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # USR1: what `sbatch --signal` is mostly given; INT: Ctrl-C


class Stopped(Exception):
    """Training ended on a signal with its checkpoint written. The same command goes on."""

    def __init__(self, signum: int, run_dir: Path):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}, checkpoint in {run_dir}; the same command goes on")
        self.exit_code = 128 + signum  # as a shell says it: 143 for SIGTERM, 138 for SIGUSR1, 130 for Ctrl-C


@dataclass
class Notice:
    """Whether a signal came, and which."""

    signum: int | None = None

    def came(self) -> bool:
        return self.signum is not None


@contextmanager
def notice() -> Iterator[Notice]:
    """Within, the signals leave a note instead of ending the process; a second Ctrl-C ends it nevertheless.

    Other threads than the main one get none.
    """
    stop_notice = Notice()
    if threading.current_thread() is not threading.main_thread():
        yield stop_notice
        return

    def note(signum: int, frame: object) -> None:
        if signum == signal.SIGINT:
            if stop_notice.came():
                raise KeyboardInterrupt
            os.write(2, b"stopping after the step under way; Ctrl-C once more ends at once\n")
        stop_notice.signum = signum

    before = {each: signal.signal(each, note) for each in SIGNALS}
    try:
        yield stop_notice
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

"""Programs that must come to an end: each has a limit, and whatever it started ends with it."""

import os
import signal
import subprocess
import time

# After a polite signal, so that a program can write what it has.
GRACE = 1.0
OVER = "it did not come to an end in time"


class Budget:
    """The seconds of one call, dealt out to its parts by their shares: what one leaves over, the later ones get."""

    def __init__(self, seconds, shares):
        self.end = time.monotonic() + seconds
        self.shares = list(shares)

    def left(self):
        return self.end - time.monotonic()

    def next(self):
        """Seconds of the next part."""
        share, rest = self.shares[0], sum(self.shares)
        self.shares = self.shares[1:]
        return max(0.0, self.left()) * share / rest


class Clock:
    """The time of one part."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def left(self):
        return max(0.0, self.end - time.monotonic())


def start(command, log, **options):
    """A program in a process group of its own, whose output goes to the file `log`."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options)


def signal_group(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def finish(process, seconds):
    """Waits so long, then ends the program and all that it started. None if it was good, otherwise what was wrong."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = OVER
        signal_group(process, signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
    # Compilers' workers, for instance, would take time from the next program.
    signal_group(process, signal.SIGKILL)
    process.wait()
    if code == OVER:
        return OVER
    return None if code == 0 else f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def run(command, log, seconds, **options):
    """As `finish`, from the start."""
    try:
        process = start(command, log, **options)
    except OSError as error:
        return str(error)
    return finish(process, seconds)

"""The commands as functions."""

from __future__ import annotations

import html
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable

from ._program import command_line, environment, failure

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import GenerateOptions, PathLike, PlanOptions, ScoreOptions, TrainOptions

    Metrics = dict[str, float]

# Seconds between two looks at a run's metrics.
POLL = 0.1
# Where the demo writes, which needs no options.
DEMO_OUTPUT = "mmpo-fast-demo"


@dataclass(frozen=True)
class Run:
    """What a training run left. A notebook shows its report."""

    output: Path
    summary: str
    """Before and after, as the program prints it at the end."""
    metrics: list[Metrics] = field(repr=False)
    """The lines of `metrics.jsonl`: a dictionary for each step and each evaluation."""

    @property
    def model(self) -> Path:
        """The trained model, a Hugging Face folder."""
        return self.output / "model"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.output / "report.html"

    def _repr_html_(self) -> str:
        page = html.escape(self.report.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40rem; border: 0" sandbox></iframe>'


def train(
    *,
    on_step: Callable[[Metrics], None] | None = None,
    show_log: bool = True,
    **options: Unpack[TrainOptions],
) -> Run:
    """Trains, and returns when the run is over. Without options the built-in demo runs.

    `on_step` is called with each line of metrics, steps and evaluations alike, while the run goes on; an exception that it
    raises stops the run, which saves first. `show_log` passes the program's log and progress on to `sys.stderr`.

    Raises `MmpoFastError` where the program ends with an error, and `KeyboardInterrupt` after it has saved.
    """
    output = Path(options.get("output") or recipe_output(options.get("recipe")) or DEMO_OUTPUT)
    stream = MetricsStream(output / "metrics.jsonl", resumes=bool(options.get("resume")))
    with subprocess.Popen(
        command_line("train", options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", errors="replace", env=environment(),
    ) as process:
        log, out = Reader(process.stderr, show_log), Reader(process.stdout, False)
        try:
            while True:
                try:
                    process.wait(POLL)
                except subprocess.TimeoutExpired:
                    stream.deliver(on_step)
                else:
                    break
            log_text, summary = log.text(), out.text()
            if process.returncode != 0:
                raise failure(process.returncode, log_text)
            stream.deliver(on_step)
        except BaseException:
            stop(process)
            raise
    return Run(output=output, summary=summary.strip("\n"), metrics=list(stream.all_lines()))


def score(**options: Unpack[ScoreOptions]) -> list[dict[str, Any]]:
    """The log-probs of preference pairs under a model: a dictionary for each pair, in the order of the file.

    With `output` they are written to that file as well.
    """
    text = finished("score", {"output": "-", **options})
    if (path := options.get("output")) is not None and str(path) != "-":
        text = Path(path).read_text(encoding="utf-8")
    # The program may print a summary after the lines.
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def generate(**options: Unpack[GenerateOptions]) -> str:
    """A model's answer to a prompt."""
    return finished("generate", options).removesuffix("\n")


def plan(**options: Unpack[PlanOptions]) -> dict[str, Any]:
    """What a training run will take: memory in bytes, work in operations, expected time in seconds.

    The options are those of `train`, and `gpu`, `ranks` and others of the plan's own. `["memory"]["peak_bytes"]` is exact.
    """
    return json.loads(finished("plan", {**options, "json": True}))


def recipe_output(recipe: PathLike | None) -> str | None:
    """The folder that a recipe names as `output`. Recipes are flat TOML; what is wrong with one, the program says."""
    try:
        text = Path(recipe or "").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"""^[ \t]*["']?output["']?[ \t]*=[ \t]*("(?:[^"\\\n]|\\.)*"|'[^'\n]*')""", text, re.MULTILINE)
    if found is None:
        return None
    quoted = found[1]
    try:
        return json.loads(quoted) if quoted.startswith('"') else quoted[1:-1]
    except ValueError:
        return None


def finished(command: str, options: Any) -> str:
    """Runs a command to its end, and gives its standard output."""
    done = subprocess.run(
        command_line(command, options), capture_output=True, text=True, encoding="utf-8", errors="replace",
        env=environment(),
    )
    if done.returncode != 0:
        raise failure(done.returncode, done.stderr)
    return done.stdout


def stop(process: subprocess.Popen[str]) -> None:
    """Asks a run to save and to end, and waits for it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait()


class Reader:
    """Reads a pipe to its end in a thread of its own, so that the program never waits for it."""

    def __init__(self, pipe: IO[str] | None, show: bool) -> None:
        assert pipe is not None
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self.read, args=(pipe, show), daemon=True)
        self.thread.start()

    def read(self, pipe: IO[str], show: bool) -> None:
        for line in pipe:
            self.lines.append(line)
            if show:
                print(line, end="", file=sys.stderr, flush=True)

    def text(self) -> str:
        self.thread.join()
        return "".join(self.lines)


class MetricsStream:
    """The lines that a run adds to its `metrics.jsonl`, each once."""

    def __init__(self, path: Path, resumes: bool) -> None:
        self.path = path
        self.place = 0
        # A resumed run keeps the lines up to its checkpoint; a new one writes the file anew, and what stands there until
        # then is another run's.
        self.known = {key(line) for line in self.all_lines()} if resumes else set()
        self.before = None if resumes else self.state()

    def state(self) -> tuple[int, int] | None:
        """What changes when the file does."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def all_lines(self) -> Iterator[Metrics]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        for line in text.splitlines(keepends=True):
            # The last line may still be under way.
            if line.endswith("\n"):
                yield json.loads(line)

    def deliver(self, receive: Callable[[Metrics], None] | None) -> None:
        """Calls `receive` with the lines that are new since the last call."""
        state = self.state()
        if receive is None or state is None or state == self.before:
            return
        self.before = None
        if state[1] < self.place:
            self.place = 0
        with self.path.open("rb") as file:
            file.seek(self.place)
            for line in file:
                # The last line may still be under way.
                if not line.endswith(b"\n"):
                    break
                self.place += len(line)
                metrics = json.loads(line)
                if key(metrics) not in self.known:
                    self.known.add(key(metrics))
                    receive(metrics)


def key(line: Metrics) -> tuple[float, bool]:
    """What tells a line from the others: its step, and whether it is an evaluation."""
    return line["step"], "loss" not in line

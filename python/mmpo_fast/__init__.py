"""Runs the program `mmpo-fast` from Python: plans, training, scores and answers, with metrics as dictionaries.

>>> import mmpo_fast
>>> run = mmpo_fast.train(model="SmolLM2-135M-Instruct", data="pairs.jsonl", output="run", on_step=print)
>>> run.metrics[-1]["loss"]

Options are the program's own, with `_` for `-`; `mmpo-fast train --help` explains them. What the program refuses is a
`MmpoFastError` with its message and exit code.
"""

from ._program import MmpoFastError, find_program
from ._run import Run, generate, plan, score, train

__all__ = ["MmpoFastError", "Run", "find_program", "generate", "plan", "score", "train"]

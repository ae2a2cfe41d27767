"""The Python package, as it was installed: trains the demo with a callback, scores, answers, and fails as it should.

Usage: python check_package.py ROOT, in an empty folder, with the wheel installed. ROOT is the repository.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import mmpo_fast

root = Path(sys.argv[1])
model, pairs = root / "tests/goldens/base/model", root / "tests/goldens/pairs.jsonl"

# The command itself is on the environment's path.
program = Path(mmpo_fast.find_program())
assert program.parent == Path(sys.executable).parent, program
assert subprocess.run([program, "--version"], capture_output=True, text=True).stdout.startswith("mmpo-fast ")

# The demo: each line of metrics once, in order, while the run goes on.
seen = []
run = mmpo_fast.train(on_step=seen.append, show_log=False)
assert run.output == Path("mmpo-fast-demo") and run.report.is_file() and (run.model / "config.json").is_file()
assert seen == run.metrics == [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
assert "chosen gained more" in run.summary and "before" in run.summary, run.summary
assert "<iframe" in run._repr_html_()

# Again over itself: nothing of the run before is reported.
again = []
mmpo_fast.train(on_step=again.append, show_log=False)
assert [line["step"] for line in again] == [line["step"] for line in seen]

# Options of every kind, and a run that goes on.
options = dict(model=model, data=pairs, output="run", max_length=160, max_prompt_length=64, pairs_per_step=4, device="cpu",
               threads=1, length_normalize=True, reward_normalize=False, reference=None)
steps = []
mmpo_fast.train(max_steps=3, on_step=steps.append, show_log=False, **options)
assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3], steps

# A recipe that names the folder.
Path("recipe.toml").write_text(f'''# output = "not this"
model = "{model}"
data = "{pairs}"
output = "by \\"recipe\\""
max_steps = 2
max_length = 160
max_prompt_length = 64
device = "cpu"
''')
steps = []
run = mmpo_fast.train(recipe="recipe.toml", on_step=steps.append, show_log=False)
assert run.output == Path('by "recipe"') and run.report.is_file(), run
assert [line["step"] for line in steps if "loss" in line] == [1, 2] and steps == run.metrics, steps
mmpo_fast.train(recipe="recipe.toml", output="elsewhere", show_log=False)
assert Path("elsewhere/report.html").is_file()

# A callback that fails stops the run, which saves.
class Enough(Exception):
    pass


def enough(line):
    if line.get("step", 0) >= 2:
        raise Enough


try:
    mmpo_fast.train(max_steps=100_000, on_step=enough, show_log=False, **{**options, "output": "cut"})
    raise SystemExit("the exception of the callback is lost")
except Enough:
    pass
assert list(Path("cut/checkpoints").glob("step-*")), "the run was not saved"

# Scores and answers.
rows = mmpo_fast.score(model=model, data=pairs, max_length=160, max_prompt_length=64, device="cpu")
assert len(rows) == 11 and rows[0]["record"] == 1 and rows[0]["logp_chosen"] < 0, rows[:1]
kept = mmpo_fast.score(model=model, data=pairs, output="s.jsonl", max_length=160, max_prompt_length=64, device="cpu")
assert kept == rows and len(Path("s.jsonl").read_text().splitlines()) == 11
assert mmpo_fast.generate(model=model, prompt="Name three colours.", max_new_tokens=4, device="cpu")

# A plan, before anything is trained.
planned = mmpo_fast.plan(**{name: value for name, value in options.items() if name != "output"})
parts = planned["memory"]["parts"]
assert sum(parts.values()) == planned["memory"]["peak_bytes"] > 0, planned["memory"]
assert planned["trained_parameters"] == planned["parameters"], planned

# What is refused says why.
for call, exit_code, part in [
    (lambda: mmpo_fast.train(beta=-1), 2, "`--beta` = -1.0 must be finite and greater than 0"),
    (lambda: mmpo_fast.train(leraning_rate=1), 2, "did you mean `--learning-rate`?"),
    (lambda: mmpo_fast.score(model="absent", data=pairs), 5, "absent"),
]:
    try:
        call()
        raise SystemExit(f"no exception: {part}")
    except mmpo_fast.MmpoFastError as error:
        assert error.exit_code == exit_code, (error.exit_code, str(error), error.log)
        assert part in str(error), str(error)
        assert "help: " in str(error), str(error)

# The code of the package's page, in order, in a folder with the names that it uses. What it logs goes to stand-ins.
logged = []


def log(line, step):
    logged.append((step, line))


sys.modules["wandb"] = SimpleNamespace(init=lambda project: None, log=log)
sys.modules["mlflow"] = SimpleNamespace(start_run=lambda: None, log_metrics=log)
Path("page").mkdir()
os.chdir("page")
Path("model").symlink_to(root / "examples/demo/model")
for name, source in [("pairs.jsonl", "pairs.jsonl"), ("held-out.jsonl", "eval_pairs.jsonl")]:
    Path(name).write_text("".join((root / "examples/demo" / source).open().readlines()[:8]))
blocks = re.findall(r"```python\n(.*?)```", (root / "docs/how-to/python.md").read_text(), re.DOTALL)
assert len(blocks) >= 5, blocks
page, printed = {}, io.StringIO()
with contextlib.redirect_stdout(printed):
    for block in blocks:
        exec(compile(block, "docs/how-to/python.md", "exec"), page)
assert [step for step, line in logged if "loss" in line] == [1, 2, 1, 2], logged
assert "2 `--beta` = -1.0 must be finite and greater than 0" in printed.getvalue(), printed.getvalue()

assert threading.active_count() == 1
print(f"the wheel: demo of {len(seen)} lines of metrics, scores, answers and errors are as they should be")

"""
Writes the table of supported pipelines into the documentation, from the checks that the tests make:

    python -m benchmarks.support_table
"""

import io
import logging
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

from slas_trl.policy.checks import denoisers_of
from tests.policy.zoo.all import FAMILIES
from tests.policy.zoo.checks import free_frozen_components, largest_error, sampled
from tests.policy.zoo.family import Family


PAGE = Path(__file__).parents[1] / "docs" / "source" / "pipelines.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
COLUMNS = (
    "family",
    "pipeline",
    "denoiser",
    "task",
    "scheduler, and what replaces it",
    "calls per step",
    "max \\|Δ log p\\|",
    "update",
)
HEADER = (f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}")


def row(family: Family) -> str:
    replayer, rollout = sampled(family)
    error = largest_error(replayer, rollout)
    free_frozen_components(replayer)
    error = max(error, largest_error(replayer, rollout))
    denoisers = " + ".join(type(module).__name__ for module in denoisers_of(replayer.pipe).values())
    own, ours = type(replayer.pipe.scheduler).__name__, type(replayer.scheduler).__name__
    calls = Counter(len(step.outputs) for step in rollout.steps)
    cells = [
        family.title,
        f"`{type(replayer.pipe).__name__}`",
        f"`{denoisers}`",
        family.task,
        f"`{own}` → `{ours}`",
        " or ".join(str(number) for number in sorted(calls)),
        f"{error:.1f}" if error == 0 else f"{error:.1e}",
        "yes" if family.task == "text-to-image" and updates(family) else "",
    ]
    return f"| {' | '.join(cells)} |"


def updates(family: Family) -> bool:
    """Whether the trainer makes an update; an error of its own is not caught."""
    from tests.trainer.zoo_trainers import zoo_trainer

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # its logs
        trainer = zoo_trainer(family, Path(folder))
        trainer.train()
    return trainer.state.global_step == 1


def main() -> None:
    logging.disable(logging.WARNING)
    rows = []
    for family in FAMILIES.values():
        rows.append(row(family))
        print(rows[-1], flush=True)
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text("\n".join([before + BEGIN, *HEADER, *rows, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()

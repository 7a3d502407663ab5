"""`slas-trl push`: put a run, finished or not, on the Hub, as `push_to_hub` would have done."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slas_trl import hub
from slas_trl.run_facts import RunFacts
from slas_trl.trainer.checkpoints import (
    STATE_FILE,
    TRAINER_STATE_FILE,
    checkpoints_in,
    last_whole_checkpoint,
    read_state,
)
from slas_trl.trainer.hub_checkpoints import checkpoint_files


def make_parser(prog: str = "slas-trl push") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run's output_dir, or one of its checkpoints")
    parser.add_argument("repo", metavar="REPO", help="user/name, or a name of your own; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository a private one")
    parser.add_argument("--revision", help="branch, made if it is not there (default: the main one)")
    parser.add_argument(
        "--hub_strategy",
        choices=["end", *hub.CHECKPOINT_STRATEGIES],
        default="end",
        help="also push the last checkpoint, or all of them, for a training to go on from (default: end, none)",
    )
    parser.add_argument("--base_model", help="Hub id of what was trained, where the run had it from a folder")
    parser.add_argument("--commit_message", help="of the commit")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    run_dir = Path(args.run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {args.run_dir}; RUN_DIR is a run's output_dir.")
    facts, edited, weights = find_result(run_dir)
    if edited is not None:
        print("README.md has been edited, and is pushed as it stands but for its places and files.", file=sys.stderr)
        if args.revision is not None:
            print(f"See that its code loads from the branch: revision={args.revision!r}.", file=sys.stderr)
    if args.base_model is not None:
        if edited is not None:
            print("It does not name --base_model: write that into it.", file=sys.stderr)
        facts.base = replace(facts.base, hub_id=args.base_model, name=None, embedded=False, license=None)
    files = hub.run_files(run_dir, weights, facts)
    files |= chosen_checkpoints(run_dir, args.hub_strategy)
    done = hub.publish(
        facts,
        hub.Push(
            repo_id=args.repo,
            files=files,
            message=args.commit_message or f"Model after {facts.step} updates",
            run_dir=run_dir,
            strategy=args.hub_strategy,
            revision=args.revision,
            private=args.private,
            replaces=hub.OLD_PICTURES if args.hub_strategy == "end" else f"{hub.OLD_PICTURES}|{hub.OLD_CHECKPOINT}",
        ),
        card=edited,
    )
    for name, what in hub.describe(files, facts):
        print(f"{name:40} {what}")
    print(f"Pushed: {done.commit_url}")


def find_result(run_dir: Path) -> tuple[RunFacts, hub.EditedCard | None, Path]:
    """
    The facts for the card, the card if it was edited, and the folder of the weights: that of the run, if they were
    saved there at its end, or else its last whole checkpoint.
    """
    if (run_dir / STATE_FILE).is_file():
        read_state(run_dir)
        return of_step(hub.read_card(run_dir.resolve().parent).facts, step_of(run_dir)), None, run_dir
    card = hub.read_card(run_dir)
    last = last_whole_checkpoint(run_dir)
    if card.saved_step is not None and (card.saved_step >= card.facts.step or last is None):
        facts = card.facts if card.saved_step == card.facts.step else of_step(card.facts, card.saved_step)
        return facts, card.edited, run_dir
    if last is None:
        raise FileNotFoundError(f"there are no trained weights in {run_dir}, and no whole checkpoint.")
    print(f"The result of the run was not saved: the weights are those of {last.name}.", file=sys.stderr)
    step = step_of(last)
    return card.facts if step == card.facts.step else of_step(card.facts, step), card.edited, last


def step_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / TRAINER_STATE_FILE).read_text())["global_step"]


def of_step(facts: RunFacts, step: int) -> RunFacts:
    """Those of a run after another update, without what was measured later."""
    return replace(
        facts,
        step=step,
        settings={**facts.settings, "updates": step},
        evaluation=None,
        samples=[],
        sheets=[],
        curves=None,
        calibration=None,
        reading=None,
        hacking=None,
    )


def chosen_checkpoints(run_dir: Path, strategy: str) -> dict[str, Path | bytes]:
    """Files of the checkpoints that `strategy` asks for."""
    if strategy == "end":
        return {}
    if (run_dir / STATE_FILE).is_file():
        folders = {run_dir: hub.LAST_CHECKPOINT if strategy == "checkpoint" else run_dir.resolve().name}
    elif strategy == hub.ALL_CHECKPOINTS:
        folders = {folder: folder.name for folder in checkpoints_in(run_dir)}
        for folder in folders:
            read_state(folder)
    else:
        last = last_whole_checkpoint(run_dir)
        folders = {} if last is None else {last: hub.LAST_CHECKPOINT}
    if not folders:
        raise FileNotFoundError(
            f"there is no checkpoint in {run_dir}; leave out --hub_strategy to push the result alone."
        )
    return {name: file for folder, place in folders.items() for name, file in checkpoint_files(folder, place).items()}

"""`slas-trl push`: put a run, finished or not, on the Hub, as `push_to_hub` would have done."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from ..publishing import repository
from ..publishing.card import edited_card
from ..publishing.facts import RunFacts, read_facts
from ..run_files import FACTS, STATE
from ..trainer.checkpoints import checkpoints_in, find, last_whole_checkpoint, read_state


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slas-trl push", allow_abbrev=False, description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run's output_dir, or one of its checkpoints")
    parser.add_argument("repo", metavar="REPO", help="user/name, or a name of your own; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository a private one")
    parser.add_argument("--revision", help="branch, made if it is not there (default: the main one)")
    also = "also push the last checkpoint, or all of them, for a training to go on from (default: end, none)"
    strategies = ["end", *repository.CHECKPOINT_STRATEGIES]
    parser.add_argument("--hub_strategy", choices=strategies, default="end", help=also)
    parser.add_argument("--base_model", help="Hub id of what was trained, where the run had it from a folder")
    parser.add_argument("--commit_message", help="of the commit")
    return parser


def main(argv: Sequence[str]) -> None:
    args = make_parser().parse_args(argv)
    run_dir = Path(args.run_dir)
    weights, facts = find_result(run_dir)
    edited = edited_card(weights, facts)
    if edited is not None:
        said = "README.md was edited, and is pushed as it is: see what its code loads, and from where."
        print(said, file=sys.stderr)
    if args.base_model is not None:
        facts.base = replace(facts.base, hub_id=args.base_model, name=None, embedded=False, license=None)
    files = repository.result_files(weights, facts, weights)
    for checkpoint in chosen_checkpoints(run_dir, args.hub_strategy):
        files |= repository.checkpoint_files(checkpoint, args.hub_strategy)
    old = repository.OLD_PICTURES + ("" if args.hub_strategy == "end" else f"|{repository.OLD_CHECKPOINT}")
    message = args.commit_message or f"Model after {facts.step} updates"
    place = args.hub_strategy, args.revision, args.private
    push = repository.Push(args.repo, files, message, run_dir, *place, replaces=old, card=edited)
    done = repository.publish(facts, push)
    print("\n".join(sorted(files)))
    print(f"Pushed: {done.commit_url}")


def find_result(run_dir: Path) -> tuple[Path, RunFacts]:
    """The folder of the newest weights, that of the run or its last whole checkpoint, and their facts."""
    last = None if (run_dir / STATE).is_file() else last_whole_checkpoint(run_dir)
    folders = [folder for folder in (run_dir, last) if folder is not None and (folder / FACTS).is_file()]
    found = [(folder, read_facts(folder)) for folder in folders or [run_dir]]
    weights, facts = max(found, key=lambda result: result[1].written)
    if weights != run_dir:
        print(f"The result of the run was not saved: the weights are those of {weights.name}.", file=sys.stderr)
    return weights, facts


def chosen_checkpoints(run_dir: Path, strategy: str) -> list[Path]:
    """Raises `ValueError` if there is none, or one of them is not whole."""
    if strategy == "end":
        return []
    is_checkpoint = (run_dir / STATE).is_file()
    newest = cast(Path, find(run_dir, str(run_dir) if is_checkpoint else True))
    if is_checkpoint or strategy != repository.ALL_CHECKPOINTS:
        return [newest]
    for folder in (chosen := checkpoints_in(run_dir)):
        read_state(folder)
    return chosen

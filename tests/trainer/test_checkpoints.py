"""Checkpoints are whole or not there: which one is taken, what is told of a broken one, and kills at any moment."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slas_trl.trainer import checkpoints
from slas_trl.trainer.checkpoints import checkpoints_in, last_whole_checkpoint, read_state

from .tiny_trainers import SAVED, alike, resumed, trained


@pytest.fixture(scope="module")
def one_update(tmp_path_factory):
    """A checkpoint with all files: with a moving average, between two updates of a rollout."""
    folder = tmp_path_factory.mktemp("one-update")
    trained(folder, max_steps=1, gradient_accumulation_steps=1, use_ema=True, **SAVED)
    return folder / "checkpoint-1"


def small_checkpoint(folder: Path, run: str = "run") -> Path:
    (folder / "unet").mkdir(parents=True)
    for name in ("weights", "unet/weights"):
        (folder / name).write_text(run)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    checkpoints.write_state(folder, run=run)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_damage_to_any_file_is_found(tmp_path, one_update, damage):
    files = [name for name in names_in(one_update) if name != "model_card.json"]  # which resuming does not need
    assert len(files) == 9 and {"slas_state.json", "ema.pt", "rollout_0.pt"} <= set(files)
    for path in one_update.glob("*.pt"):
        torch.load(path, weights_only=True)  # runs no code of whoever wrote the file
    for name in files:
        folder = shutil.copytree(one_update, tmp_path / name / "checkpoint-1")
        assert last_whole_checkpoint(folder.parent) == folder
        content = bytearray((folder / name).read_bytes())
        if damage == "cut":
            os.truncate(folder / name, len(content) // 2)
        elif damage == "gone":
            (folder / name).unlink()
        else:  # one bit, and of the same size: of a number, in the files of text
            content[content.index(b"1") if name.endswith(".json") else len(content) // 2] ^= 1
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint-1' is damaged"):
            read_state(folder)
        assert last_whole_checkpoint(folder.parent) is None


@pytest.mark.parametrize("text", ["{}", "5", "null", "[]", '"x"', '{"global_step": "2"}', "[" * 10**5])
def test_states_that_are_none(tmp_path, text):
    for name in ("slas_state.json", "trainer_state.json"):
        folder = small_checkpoint(tmp_path / name / "checkpoint-3")
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read_state(folder)
        assert last_whole_checkpoint(folder.parent) is None


def test_the_newest_checkpoint_is_the_last_written_one(tmp_path):
    for number in (3, 2, 1):  # of three runs in the same folder
        small_checkpoint(tmp_path / f"checkpoint-{number}")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    (tmp_path / "checkpoint-1" / "weights").unlink()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize(("limit", "kept"), [(1, [2, 4]), (2, [2, 4]), (3, [2, 3, 4]), (None, [1, 2, 3, 4])])
def test_the_best_checkpoint_stays(tmp_path, limit, kept):
    for number in (1, 2, 3, 4):
        small_checkpoint(tmp_path / f"checkpoint-{number}")
    checkpoints.rotate(tmp_path / "checkpoint-4", limit, best=str(tmp_path / "checkpoint-2"))
    assert names_in(tmp_path) == [f"checkpoint-{number}" for number in kept]


def changes_files(event: str, arguments: tuple) -> bool:
    if event == "open":
        return arguments[2] & os.O_ACCMODE != os.O_RDONLY
    return event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir")


def killed_before(number: int, action: Callable[[], None]) -> bool:
    """Run `action` in a process that SIGKILL ends before its change of files of that number, if there are so many."""
    child = os.fork()
    if child == 0:
        left = iter(range(number))

        def hook(event: str, arguments: tuple) -> None:
            if changes_files(event, arguments) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_moment_of_a_save(tmp_path, monkeypatch):
    """The save replaces an earlier run's checkpoint, and deletes an older one."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # for power cuts; it takes most of the time
    run, seen = tmp_path / "run", set()
    folder = run / "checkpoint-3"
    writing = run / "_writing-checkpoint-3"

    def save():
        checkpoints.publish(small_checkpoint(writing / folder.name, "new"), folder)
        checkpoints.discard(writing)
        checkpoints.rotate(folder, 2, None)

    killed, moment = True, 0
    while killed:
        shutil.rmtree(run, ignore_errors=True)
        for number, name in ((1, "new"), (2, "new"), (3, "old")):
            small_checkpoint(run / f"checkpoint-{number}", name)
        killed = killed_before(moment, save)
        for found in checkpoints_in(run):
            read_state(found)  # all are whole
        for path in writing.rglob("*") if writing.exists() else ():
            os.utime(path, (0, 0))  # the next process starts later
        if writing.exists():
            os.utime(writing, (0, 0))
        checkpoints.tidy(run)
        names = names_in(run)
        assert names in (["checkpoint-2", "checkpoint-3"], ["checkpoint-1", "checkpoint-2", "checkpoint-3"])
        seen.add((len(names), read_state(folder)["run"], (folder / "weights").read_text()))
        moment += 1
    assert seen == {(3, "old", "old"), (3, "new", "new"), (2, "new", "new")} and moment > 20


def test_what_another_process_is_writing_stays(tmp_path):
    (tmp_path / "_writing-checkpoint-3").mkdir()
    checkpoints.tidy(tmp_path)
    assert names_in(tmp_path) == ["_writing-checkpoint-3"]


def test_killed_runs_come_to_the_end_of_the_whole_one(tmp_path):
    """As benchmarks/kill_and_resume.py does it at random moments, and more often."""
    settings = {"gradient_accumulation_steps": 3, "use_ema": True, "max_steps": 3, **SAVED}
    whole, run = trained(tmp_path / "whole", **settings), tmp_path / "run"
    for moment in (9, 30, 45):  # in the first checkpoint, after it, and in the second
        assert killed_before(moment, lambda: resumed(run, last_whole_checkpoint(run) is not None, **settings))
    assert alike(resumed(run, True, **settings), whole)

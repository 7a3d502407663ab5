"""Runs that SIGKILL ends, by the script that does it more often."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "kill_and_resume.py"


def test_a_killed_run_comes_to_the_end_of_the_whole_one():
    """Two kills at any moment, and one while a checkpoint is written."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "3", "--seed", "0", "--updates", "3"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every run came to the same end, to the last bit." in done.stdout
    assert "3 kills in" in done.stdout and done.stdout.count("aimed") == 1


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ended(folder: Path, value: float = 1.0, lines: int = 3) -> Path:
    """What a run of three updates leaves, in small."""
    (folder / "checkpoint-3").mkdir(parents=True)
    torch.save({"state": [torch.tensor([value, 2.0])], "steps": 3}, folder / "checkpoint-3" / "optimizer.pt")
    logs = [json.dumps({"step": step, "loss": 0.5, "step_time": value}) + "\n" for step in range(1, lines + 1)]
    (folder / "metrics.jsonl").write_text("".join(logs))
    return folder


def test_the_script_sees_what_differs(tmp_path, script):
    whole = ended(tmp_path / "whole")
    assert script.compare(whole, ended(tmp_path / "same"), 3) == []
    other = ended(tmp_path / "other", value=1.0 + 2**-23, lines=2)
    (other / "_writing-checkpoint-3").mkdir()
    assert script.compare(whole, other, 3) == [
        "optimizer.pt/state/0",
        "metrics.jsonl",
        "left over: _writing-checkpoint-3",
    ]
    (tmp_path / "none").mkdir()
    assert "instead of ['optimizer.pt']" in script.compare(whole, tmp_path / "none", 3)[0]

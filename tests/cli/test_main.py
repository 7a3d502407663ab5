"""`slas-trl` as a person types it: what it prints, and the exit status."""

import io
import os
import signal
import sys
import time

import pytest

from slas_trl import __version__
from slas_trl.cli.main import COMMANDS, main
from tests.cli.tiny_run import SMALL, forked


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert main([]) == 0 and capsys.readouterr().out == printed


def test_versions(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in (f"slas-trl: {__version__}", "torch: 2.", "Accelerators: "))
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"slas-trl {__version__}\n"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--output", "no/x.png"], "folder no"),
        (["--output", "x.pgn"], "x.pgn"),
        (["--prompt", " "], "--prompt"),
        (["--num_images", "0"], "--num_images"),
        (["--num_inference_steps", "0"], "--num_inference_steps"),
        (["--model_name_or_path", "."], "model_index.json"),
    ],
)
def test_generate_refuses_bad_input(capsys, tmp_path, monkeypatch, options, named):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--prompt", "x", "--output", "x.png", *options]) == 2
    printed = capsys.readouterr()
    assert named in printed.err and "SLAS_TRL_DEBUG=1" in printed.err and "Traceback" not in printed.err
    assert printed.out == "" and list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SLAS_TRL_DEBUG", "1")
    with pytest.raises(ValueError, match="--prompt"):
        main(["generate", "--prompt", " ", "--output", "x.png"])


def test_a_terminal_that_lacks_a_character_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr("slas_trl.scripts.env.main", lambda argv: print("±"))
    assert main(["env"]) == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2), (RuntimeError("a bug"), None)],
)
def test_exit_status_of_errors(monkeypatch, capsys, error, status):
    def raising(argv):
        raise error

    monkeypatch.setattr("slas_trl.scripts.env.main", raising)
    if status is None:  # other errors are bugs, and show themselves
        with pytest.raises(RuntimeError, match="a bug"):
            main(["env"])
    else:
        assert main(["env"]) == status
        assert "slas-trl env: " in capsys.readouterr().err


URL, TOKEN = "remote:url=http://user:s3cret@127.0.0.1:9/", "remote:token=s3cret"


@pytest.mark.parametrize(
    ("command", "reward"),
    [("train", URL), ("doctor", TOKEN), ("compare", URL), ("prompts score --output x.jsonl", TOKEN),
     ("serve-reward", TOKEN)],
)  # fmt: skip
def test_a_reward_is_refused_without_its_secrets(tmp_path, monkeypatch, capfd, command, reward):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, "--output_dir", "run", "--max_steps", "2", "--reward_funcs", reward]
    argv = [*command.split(), *([reward] if command == "serve-reward" else options)]
    assert main(argv) == (1 if command == "doctor" else 2)
    printed = "".join(capfd.readouterr())
    assert "remote" in printed and "s3cret" not in printed


def test_a_reward_is_used_and_its_secrets_are_nowhere(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own.py").write_text(
        "def own(prompts, images, api_key, **columns):\n    return [len(api_key) + i for i in range(len(images))]\n"
    )
    argv = [*SMALL, "--reward_funcs", "own.py:own:api_key=s3cret", "--max_steps", "1"]
    assert main(["train", *argv, "--report_prompts", "1", "--output_dir", "run"]) == 0
    (tmp_path / "prompts.txt").write_text("a red circle")
    assert main(["prompts", "score", *argv, "--dataset_name", "prompts.txt", "--output", "scores.jsonl"]) == 0
    printed = "".join(capfd.readouterr())
    assert "for own.py:own; results" in printed and "s3cret" not in printed
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert b"api_key=***" in (tmp_path / "scores.settings.json").read_bytes()
    assert not any(b"s3cret" in path.read_bytes() for path in kept)


SLOW_REWARD = """
import time
from pathlib import Path

if Path("slow").exists():
    Path("imported").touch()
    time.sleep(60)

def slow(prompts, images, **columns):
    Path("scored").touch()
    time.sleep(SECONDS)
    return list(range(len(images)))
"""


@pytest.mark.parametrize(
    ("when", "signals", "status", "said"),
    [
        ("imported", [signal.SIGTERM], 143, "slas-trl: ended by SIGTERM"),
        ("scored", [signal.SIGHUP] * 2, 129, "nothing to save"),
        ("scored", [signal.SIGINT] * 5, 130, ""),
        ("run/metrics.jsonl", [signal.SIGTERM], 143, "--resume_from_checkpoint"),
    ],
)
def test_signals_end_a_training(tmp_path, when, signals, status, said):
    """With a sentence at most, and soon where Ctrl-C is pressed again, whatever the reward's thread does."""
    (tmp_path / "own.py").write_text(SLOW_REWARD.replace("SECONDS", "30" if signal.SIGINT in signals else "1"))
    if when == "imported":
        (tmp_path / "slow").touch()
    argv = [*SMALL, "--reward_funcs", "own.py:slow", "--report_prompts", "0", "--save_strategy", "no"]
    child = forked(tmp_path, "train", *argv, "--output_dir", "run")
    deadline = time.monotonic() + 100
    while not (tmp_path / when).exists():
        assert time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    start = time.monotonic()
    for number in signals:
        os.kill(child, number)
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors = (tmp_path / "stderr").read_text()
    assert code == status, errors
    assert said in errors and "Traceback" not in errors
    assert len(list(tmp_path.glob("run/checkpoint-*"))) == (when == "run/metrics.jsonl")
    assert time.monotonic() - start < 25 or signal.SIGINT not in signals

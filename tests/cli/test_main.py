"""`slas-trl` as a person types it: what it prints, and the exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slas_trl import __version__
from slas_trl.cli.main import main


ROOT = Path(__file__).parents[2]


def slas_trl(*argv: str, **environ: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "slas_trl.cli.main", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SLAS_TRL_DEBUG": "0", **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def fail(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The message of a command that has to end with status 2."""
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def test_help_lists_the_commands():
    done = slas_trl("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "generate", "env"))
    assert slas_trl().stdout == done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"slas-trl {__version__}\n"


def test_unknown_command():
    done = slas_trl("tran")
    assert done.returncode == 2
    assert "'tran'" in done.stderr and "train" in done.stderr
    assert "Traceback" not in done.stderr


def test_env():
    done = slas_trl("env")
    assert done.returncode == 0, done.stderr
    assert f"slas-trl: {__version__}" in done.stdout
    assert "torch: 2." in done.stdout and "Accelerators: " in done.stdout


def test_unknown_option_of_a_command_names_it():
    done = slas_trl("generate", "--prompt", "x", "--output", "x.png", "--sede", "1")
    assert done.returncode == 2
    assert "--sede" in done.stderr


def test_generate_refuses_bad_input_before_it_loads_anything(capsys, tmp_path):
    picture = str(tmp_path / "x.png")
    assert "does not exist" in fail(capsys, "generate", "--prompt", "x", "--output", str(tmp_path / "no" / "x.png"))
    assert "x.pgn" in fail(capsys, "generate", "--prompt", "x", "--output", str(tmp_path / "x.pgn"))
    assert "--prompt is empty" in fail(capsys, "generate", "--prompt", " ", "--output", picture)
    assert "at least 1, got 0" in fail(capsys, "generate", "--prompt", "x", "--output", picture, "--num_images", "0")
    message = fail(capsys, "generate", "--prompt", "x", "--output", picture, "--model_name_or_path", str(tmp_path))
    assert "model_index.json" in message
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    argv = ("generate", "--prompt", " ", "--output", "x.png")
    quiet, loud = slas_trl(*argv), slas_trl(*argv, SLAS_TRL_DEBUG="1")
    assert "Traceback" not in quiet.stderr and "SLAS_TRL_DEBUG=1" in quiet.stderr
    assert "Traceback" in loud.stderr and "--prompt is empty" in loud.stderr


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2), (TypeError("t"), 2)]
)
def test_exit_status_of_errors(monkeypatch, capsys, error, status):
    def raising(argv):
        raise error

    monkeypatch.setattr("slas_trl.scripts.env.main", raising)
    assert main(["env"]) == status
    assert "slas-trl env: " in capsys.readouterr().err


def test_other_errors_are_bugs_and_show_themselves(monkeypatch):
    def raising(argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr("slas_trl.scripts.env.main", raising)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["env"])

"""`slas-trl serve-reward`: what it refuses before it listens."""

import sys

import pytest

from slas_trl.cli.main import main


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.rewards


def refused(capsys, *argv: str) -> str:
    assert main(["serve-reward", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err


@pytest.fixture
def started(monkeypatch):
    """What would be served."""
    calls = []
    monkeypatch.delenv("SLAS_TRL_REWARD_TOKEN", raising=False)
    monkeypatch.setattr("slas_trl.scripts.serve_reward.serve", lambda listener, *rest: calls.append(listener))
    return calls


def test_others_need_a_token(capsys, started, monkeypatch):
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        message = refused(capsys, "shapes_verifier", "--host", host)
        assert f"--host {host}" in message and "SLAS_TRL_REWARD_TOKEN" in message
    monkeypatch.setenv("SLAS_TRL_REWARD_TOKEN", "a-token")
    assert main(["serve-reward", "shapes_coloured_area", "--host", "0.0.0.0", "--port", "0"]) == 0
    assert started[0].getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["shapes_klip", "--port", "0"], "Did you mean 'shapes_clip'"),
        (["remote:size=1", "--port", "0"], "no option 'size'"),
        (["shapes_verifier", "--token", "two words"], "visible ASCII"),
        (["shapes_verifier", "--token", ""], "visible ASCII"),
        (["shapes_verifier", "--port", "70000"], "--port 70000"),
    ],
)
def test_options_that_cannot_be(capsys, started, options, message):
    said = refused(capsys, *options)
    assert message in said and "two words" not in said and not started


def test_the_model_is_loaded_before_it_listens(capsys, started, tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "def missing(prompts, images, **columns):\n    raise FileNotFoundError('the file x.pt is missing')\n"
        "def picky(prompts, images, spec, **columns):\n    return [spec['x']] * len(images)\n"
    )
    assert "the file x.pt is missing" in refused(capsys, f"{file}:missing", "--port", "0")
    assert not started
    assert main(["serve-reward", f"{file}:missing", "--port", "0", "--no_warm_up"]) == 0
    assert main(["serve-reward", f"{file}:picky", "--port", "0"]) == 0  # one that a gray picture is not enough for
    assert "'spec'" in capsys.readouterr().err
    assert len(started) == 2


def test_without_its_packages(capsys, started, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert 'pip install "slas-trl[serve]"' in refused(capsys, "shapes_coloured_area", "--port", "0") and not started

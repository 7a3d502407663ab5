"""`slas-trl prompts`: from a list of prompts to scores, and to a shorter list that is trained on."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from slas_trl.cli.main import main
from slas_trl.scripts import prompts
from slas_trl.shapes import shapes_prompts
from slas_trl.trainer.prompts import load_prompts
from tests.cli.tiny_run import REWARDS, SMALL, make_home


TEXTS = ["a dot", "a box", "dots\u2028and more", "a bar", "bars"]
PROMPTS = [{"prompt": prompt, "tag": i} for i, prompt in enumerate(TEXTS)]
MORE_REWARDS = """
import os, signal
from pathlib import Path

def tagged(prompts, images, tag, **columns):
    # The same for all images of the first prompt; two values for the second; none for the third.
    return [None if t == 2 else 1.0 if t == 0 else i % 2 if t == 1 else d
            for i, (t, d) in enumerate(zip(tag, darkness(prompts, images)))]

def killed_once(prompts, images, tag, **columns):
    if 2 in tag and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return darkness(prompts, images)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rewards = {"reward_funcs": ["prompt_rewards:darkness", "prompt_rewards:tagged"], "reward_weights": [0.5, 1.0]}
    settings = {**rewards, "dataset_name": "prompts.jsonl", "disable_tqdm": True}
    folder = make_home(tmp_path_factory.mktemp("home"), "prompt_rewards", REWARDS + MORE_REWARDS, **settings)
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def scored(home: Path) -> Path:
    with contextlib.chdir(home):
        score(output="scores.jsonl")
    return home / "scores.jsonl"


def score(*options: str, output: str) -> list[str]:
    assert main(["prompts", "score", "--config", "run.yaml", "--output", output, *options]) == 0
    return Path(output).read_text().splitlines()


def test_every_prompt_with_its_columns_and_scores(scored, home):
    lines = [json.loads(line) for line in scored.read_text().splitlines()]
    assert [(line["row"], {"prompt": line["prompt"], "tag": line["tag"]}) for line in lines] == [*enumerate(PROMPTS)]
    tagged = [line["rewards"]["tagged"] for line in lines]
    assert tagged[0] == {"mean": 1.0, "std": 0.0, "distinct": 0.25}
    assert tagged[1] == {"mean": 0.5, "std": 0.5, "distinct": 0.5}
    assert tagged[2] == {"mean": None, "std": None, "distinct": None}
    darkness = [line["rewards"]["darkness"] for line in lines]
    # From one initial noise: only the noise of the steps, as in training, makes a difference.
    assert all(scores["std"] > 1e-4 and scores["distinct"] == 1.0 for scores in darkness)
    for row, weight in ((0, 0.5), (2, 0.5), (3, 1.5)):  # the weighted sum, of what there is
        assert lines[row]["std"] == pytest.approx(weight * darkness[row]["std"], rel=1e-3)
    assert lines[3]["mean"] == pytest.approx(1.5 * darkness[3]["mean"], rel=1e-5)
    assert not (home / "run").exists()  # nothing else is written


def test_the_scores_are_those_of_the_first_rollout_of_a_training():
    """For two equal prompts: those of a training come in another order."""
    Path("two.txt").write_text("a dot\na dot")
    argv = ["--dataset_name", "two.txt", "--reward_funcs", "prompt_rewards:darkness"]
    argv += ["--reward_weights", "1", "--max_steps", "1", "--report_prompts", "0", "--output_dir", "trained"]
    assert main(["train", "--config", "run.yaml", *argv]) == 0
    lines = [json.loads(line) for line in score(*argv, output="two.jsonl")]
    logged = json.loads(Path("trained/metrics.jsonl").read_text().splitlines()[0])
    assert logged["reward"] == pytest.approx(sum(line["mean"] for line in lines) / 2, rel=1e-6)
    assert logged["reward_std"] == pytest.approx(sum(line["std"] for line in lines) / 2, rel=1e-4)


def test_filtering_is_a_line_of_datasets(scored, capsys):
    assert main(["prompts"]) == 0 and "score" in capsys.readouterr().out
    assert main(["prompts", "filter", "--scores", "scores.jsonl"]) == 2 and "load_dataset(" in capsys.readouterr().err
    data = datasets.load_dataset("json", data_files="scores.jsonl", split="train")
    assert isinstance(data, Dataset)
    data.filter(lambda row: (row["rewards"]["tagged"]["std"] or 0) > 1e-5).to_json("kept.jsonl")
    assert load_prompts("kept.jsonl")["tag"] == [1, 3, 4]


def test_it_is_repeatable_and_depends_on_the_seed(scored):
    assert score(output="again.jsonl") == scored.read_text().splitlines()
    assert score("--seed", "1", output="other.jsonl")[0] != scored.read_text().splitlines()[0]


def test_a_kill_loses_nothing_that_was_computed(capsys):
    argv = ["--reward_funcs", "prompt_rewards:killed_once", "--reward_weights", "1"]
    child = os.fork()
    if child == 0:
        try:
            score(*argv, output="k.jsonl")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    before = Path("k.jsonl").read_text().splitlines()
    assert len(before) == 2  # two prompts at once
    # What is there is not computed again, and half a line is dropped.
    before[1] = before[1].replace('"a box"', '"marked"')
    Path("k.jsonl").write_text("\n".join([*before, before[1][:40]]))
    after = score(*argv, output="k.jsonl")
    assert "Wrote k.jsonl: 5 prompts, 4 images each, 5 with two scores or more." in capsys.readouterr().out
    assert after[:2] == before and after[2:] == score(*argv, output="whole.jsonl")[2:]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--num_generations", "8"], "num_generations"),
        (["--dataset_name", "fewer.jsonl"], "prompts"),
        (["--output", "prompts.jsonl"], "something else"),
    ],
)
def test_other_settings_are_not_mixed_with_these(scored, options, named):
    Path("fewer.jsonl").write_text("\n".join(map(json.dumps, PROMPTS[:4])))
    with pytest.raises(ValueError, match=named):
        prompts.main(["score", "--config", "run.yaml", "--output", "scores.jsonl", *options])
    assert load_prompts("prompts.jsonl").to_list() == PROMPTS  # as it was


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--output", "scores.csv"], ".jsonl"),
        (["--output", "no/scores.jsonl"], "folder no"),
        (["--output", "x.jsonl", "--model_name_or_path", "model"], "--reward_funcs"),
    ],
)
def test_bad_input(argv, named):
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        prompts.main(["score", *argv])
    assert not Path("x.jsonl").exists()


def test_the_embedded_pipeline_is_the_default(tmp_path):
    (tmp_path / "few.txt").write_text("\n".join(shapes_prompts("test")["prompt"][:2]))
    argv = [*SMALL, "--dataset_name", str(tmp_path / "few.txt")]
    assert main(["prompts", "score", "--output", str(tmp_path / "s.jsonl"), *argv]) == 0
    line = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[1])
    assert set(line["rewards"]) == {"shapes_verifier", "shapes_clip"}
    assert line["mean"] == pytest.approx(line["rewards"]["shapes_verifier"]["mean"])

"""`slas-trl compare`, from the command line to its tables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slas_trl.cli.main import main
from slas_trl.scripts.compare import arms_of
from slas_trl.scripts.compare_arm import run_arm
from slas_trl.trainer import SLASConfig


ROOT = Path(__file__).parents[2]
# Two chunks of 4 images for two prompts: small, and of everything there is more than one.
SMALL = [
    *("--eval_prompts", "6", "--eval_images_per_prompt", "1", "--eval_every", "1", "--max_steps", "1"),
    *("--per_device_train_batch_size", "4", "--steps_per_generation", "2", "--num_generations", "4"),
    *("--reward_funcs", "shapes_verifier", "shapes_coloured_area", "--reward_weights", "1", "0.5"),
    *("--num_inference_steps", "4", "--sde_window_size", "2", "--log_completions", "False"),
    *("--learning_rate", "1e-3", "--lora_r", "2", "--save_strategy", "no", "--disable_tqdm", "True"),
]
COMMAND = ["compare", "--arms", "linear,slas", "--gammas", "1", "--seeds", "2", *SMALL]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """A comparison whose arms were run in this process, one after the other."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slas_trl.scripts.compare._run_all", lambda folders, *rest: [*map(run_arm, folders)])
        assert main([*COMMAND, "--output_dir", str(folder)]) == 0
    return folder


def results(folder: Path, arm: str) -> list[dict]:
    return [read(folder / arm / f"seed-{seed}" / "result.json") for seed in (42, 43)]


def test_the_arms_of_a_seed_begin_with_the_same_rollout(compared):
    linear, slas = results(compared, "linear"), results(compared, "slas-1")
    first = [result["first_rollout"] for result in linear]
    assert first == [result["first_rollout"] for result in slas] and first[0] != first[1]
    assert "rewards/shapes_verifier/mean" in first[0]
    # And go apart from there.
    after = [of_arm[0]["evaluations"]["1"]["kl"] for of_arm in (linear, slas)]
    assert after[0] != after[1] and min(after) > 0


def test_the_report_holds_what_the_runs_measured(compared):
    numbers = read(compared / "comparison.json")
    scores = np.array([result["evaluations"]["1"]["scores"]["graded"] for result in results(compared, "slas-1")])
    assert scores.shape == (2, 6)
    mean, low, high = numbers["final"]["slas-1"]["graded"]
    assert low <= mean <= high and mean == pytest.approx(scores.mean())
    base = read(compared / "base" / "result.json")["evaluations"]["0"]
    assert base["kl"] == 0
    trained = np.array(base["scores"]["shapes_verifier"]) + 0.5 * np.array(base["scores"]["shapes_coloured_area"])
    change = numbers["change_from_base"]["slas-1"]["trained reward"][0]
    assert numbers["final"]["slas-1"]["trained reward"][0] - change == pytest.approx(trained.mean())
    assert set(numbers["final_differences"]) == {"batch std, γ 1 − batch std, γ 0"}
    text = (compared / "comparison.md").read_text(encoding="utf-8")
    assert "`slas-trl compare --arms linear,slas" in text and "shapes_verifier + 0.5 × shapes_coloured_area" in text
    assert f"{mean:.3f} ± {mean - low:.3f}" in text
    with Image.open(compared / "comparison.png") as picture:
        assert picture.size[0] > 1000 and len(set(picture.convert("L").tobytes())) > 20
    with Image.open(compared / "samples.png") as sheet:
        assert sheet.size[1] > 3 * 160  # base and two arms, one below the other
    with Image.open(compared / "base" / "samples" / "0.png") as picture:
        assert picture.size == (32, 32)


def test_finished_arms_are_not_run_again(compared, capsys):
    """And other settings, and other first rollouts, are refused."""
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("result.json")}
    assert len(before) == 5
    command = [*COMMAND, "--output_dir", str(compared)]
    # A report on some of the arms, from what is there
    assert main([*command, "--arms", "slas"]) == 0
    assert "0 of 3 runs to do" in capsys.readouterr().out
    assert main([*command, "--beta", "0.5"]) == 2
    assert "--output_dir" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in compared.rglob("result.json")} == before
    path = compared / "linear" / "seed-43" / "result.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "first_rollout": "another"}), encoding="utf-8")
    assert main(command) == 2
    assert "seed 43" in capsys.readouterr().err
    path.write_text(text)


REWARDS = """
from pathlib import Path

def fragile(prompts, images, **columns):
    if not Path(__file__).with_name("mended").exists():
        raise RuntimeError("the judge is ill")
    return [float(sum(image.convert("L").tobytes())) for image in images]
"""


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    """Each in a process of its own."""
    (tmp_path / "fragile_rewards.py").write_text(REWARDS)
    (tmp_path / "config.yaml").write_text("reward_funcs: [fragile_rewards:fragile]\nlearning_rate: 1.0e-3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = [*SMALL[: SMALL.index("--reward_funcs")], "--save_strategy", "no", "--eval_prompts", "2"]
    line = ["compare", "--arms", "grpo", "--seeds", "1", *small, "--config", "config.yaml", "--output_dir", "out"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "failed" in said and "the judge is ill" in said and "log.txt" in said
    (tmp_path / "mended").touch()
    assert main([*line, "--processes", "2"]) == 0
    assert "[2/2] " in capsys.readouterr().out and (tmp_path / "out" / "comparison.md").exists()
    # The file is noticed when it changes, for arms would differ in more than their advantages.
    (tmp_path / "config.yaml").write_text("reward_funcs: [fragile_rewards:fragile]\nlearning_rate: 2.0e-3\n")
    assert main(line) == 2
    assert "'learning_rate': 0.002" in capsys.readouterr().err


@pytest.mark.slow
def test_after_an_interruption_the_same_command_goes_on(tmp_path, capsys):
    line = ["compare", "--arms", "linear", "--seeds", "1", *SMALL, "--max_steps", "6", "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "slas_trl.cli.main", *line]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "linear" / "seed-42"
    evaluations = folder / "evaluations.json"
    deadline = time.monotonic() + 200
    while not (evaluations.exists() and "2" in read(evaluations)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "interrupted" in said and "Install torchvision" not in said
    interrupted = read(evaluations)
    assert len(interrupted) < 6
    assert main(line) == 0
    assert "1 of 2 runs to do" in capsys.readouterr().out
    resumed = read(folder / "result.json")
    assert sorted(resumed["evaluations"], key=int) == list("123456")
    assert resumed["evaluations"]["2"] == interrupted["2"]
    assert resumed["first_rollout"] and list(folder.glob("checkpoint-*"))  # of the run before the interruption


def test_arms():
    arms = arms_of(["grpo", "linear", "slas"], [0.25, 1.0])
    assert [arm.name for arm in arms] == ["grpo", "linear", "slas-0.25", "slas-1"]
    assert "constant" in arms_of(["grpo"], [])[0].options  # whatever schedule the slas arms have
    for kinds, gammas in ((["ppo"], []), (["slas"], [0.5, 0.5]), (["slas"], []), (["slas"], [0.0])):
        with pytest.raises(ValueError, match="--gammas"):
            arms_of(kinds, gammas)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gamma", "0.5"], "--gammas"),
        (["--config", "run.yaml"], "push_to_hub"),
        (["--scale_rewards=group"], "--arms"),
        (["--seeds", "0"], "--seeds"),
        (["--eval_prompts", "1000"], "120 held-out prompts"),
        (["--model_name_or_path", "somewhere"], "--reward_funcs is missing"),
        (["--gamma_schedule", "ess", "--gammas", "0.5,1"], "gamma_schedule"),
        (["--gamma_schedule", "kl", "--gammas", "0.5,2"], "gamma_max"),
    ],
)
def test_bad_input(argv, said, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("push_to_hub: true\ngamma: 0.7\n")
    argv = [word.replace("run.yaml", str(tmp_path / "run.yaml")) for word in argv]
    assert main(["compare", "--output_dir", str(tmp_path / "out"), *argv]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_gpus_are_no_obstacle(monkeypatch, capsys, tmp_path):
    """The options are read as an arm reads them, which sees one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    more = property(lambda args: 1 + os.environ["CUDA_VISIBLE_DEVICES"].count(","))
    monkeypatch.setattr(SLASConfig, "n_gpu", more)
    assert main(["compare", "--eval_prompts", "1000", "--output_dir", str(tmp_path)]) == 2
    assert "120 held-out prompts" in capsys.readouterr().err

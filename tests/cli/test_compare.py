"""`slas-trl compare`, from the command line to its tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slas_trl.cli.main import main
from slas_trl.scripts.compare import arms_of, make_parser
from slas_trl.trainer import SLASConfig


ROOT = Path(__file__).parents[2]
# Two chunks of 4 images for two prompts: small, and of everything there is more than one.
SMALL = [
    *("--eval_prompts", "12", "--eval_images_per_prompt", "1", "--eval_every", "1", "--max_steps", "2"),
    *("--per_device_train_batch_size", "4", "--steps_per_generation", "2", "--num_generations", "4"),
    *("--reward_funcs", "shapes_verifier", "shapes_coloured_area", "--reward_weights", "1", "0.5"),
    *("--num_inference_steps", "4", "--sde_window_size", "2", "--log_completions", "False"),
    *("--learning_rate", "1e-3", "--lora_r", "2", "--save_strategy", "no", "--disable_tqdm", "True"),
]
ARMS = ["--arms", "grpo,linear,slas", "--gammas", "1", "--seeds", "2"]


def command(*argv: str) -> list[str]:
    return ["compare", *ARMS, *SMALL, *argv]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    assert main(command("--processes", "2", "--output_dir", str(folder))) == 0
    return folder


def test_the_arms_of_a_seed_begin_with_the_same_rollout(compared):
    first = {
        arm: [read(compared / arm / f"seed-{seed}" / "result.json")["first_rollout"] for seed in (42, 43)]
        for arm in ("grpo", "linear", "slas-1")
    }
    assert first["grpo"] == first["linear"] == first["slas-1"]
    assert first["grpo"][0] != first["grpo"][1]
    # And go apart from there.
    after = [read(compared / arm / "seed-42" / "result.json")["evaluations"]["2"]["kl"] for arm in first]
    assert len(set(after)) == 3 and min(after) > 0


def test_the_report_holds_what_the_runs_measured(compared):
    numbers = read(compared / "comparison.json")
    scores = np.array([
        read(compared / "slas-1" / f"seed-{seed}" / "result.json")["evaluations"]["2"]["scores"]["strict"]
        for seed in (42, 43)
    ])  # fmt: skip
    assert scores.shape == (2, 12)
    mean, low, high = numbers["final"]["slas-1"]["strict"]
    assert mean == pytest.approx(scores.mean())
    assert low <= mean <= high
    base = read(compared / "base" / "result.json")["evaluations"]["0"]
    assert base["kl"] == 0
    area = np.array(base["scores"]["shapes_coloured_area"])
    trained = np.array(base["scores"]["shapes_verifier"]) + 0.5 * area
    change = numbers["change_from_base"]["slas-1"]["trained reward"][0]
    assert numbers["final"]["slas-1"]["trained reward"][0] - change == pytest.approx(trained.mean())
    assert set(numbers["final_differences"]) == {
        "batch std, γ 0 − group std",
        "batch std, γ 1 − group std",
        "batch std, γ 1 − batch std, γ 0",
    }
    text = (compared / "comparison.md").read_text(encoding="utf-8")
    assert "`slas-trl compare --arms grpo,linear,slas" in text
    assert "shapes_verifier + 0.5 × shapes_coloured_area" in text
    assert f"{mean:.3f} [{low:.3f}, {high:.3f}]" in text
    with Image.open(compared / "comparison.png") as picture:
        assert picture.size[0] > 1000 and len(set(picture.convert("L").tobytes())) > 20
    with Image.open(compared / "samples.png") as sheet:
        assert sheet.size[1] > 4 * 160  # base and three arms, one below the other
    # The picture of the base is the base's.
    with Image.open(compared / "base" / "samples" / "0.png") as picture:
        assert picture.size == (32, 32)


def test_finished_arms_are_not_run_again(compared, capsys):
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("result.json")}
    assert len(before) == 7
    # A report on some of the arms, from what is there
    line = [*command("--output_dir", str(compared)), "--arms", "grpo,slas"]
    assert main(line) == 0
    assert "0 of 5 runs to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in compared.rglob("result.json")} == before


def test_other_settings_are_refused(compared, capsys):
    assert main(command("--output_dir", str(compared), "--beta", "0.5")) == 2
    said = capsys.readouterr().err
    assert "other settings" in said and "--output_dir" in said
    assert len(list(compared.rglob("result.json"))) == 7


def test_different_first_rollouts_are_not_compared(compared, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(compared, copy)
    path = copy / "linear" / "seed-43" / "result.json"
    path.write_text(json.dumps({**read(path), "first_rollout": "another"}), encoding="utf-8")
    assert main(command("--output_dir", str(copy))) == 2
    said = capsys.readouterr().err
    assert "seed 43" in said and "different rollouts" in said


REWARDS = """
from pathlib import Path

def fragile(prompts, images, **columns):
    if not Path(__file__).with_name("mended").exists():
        raise RuntimeError("the judge is ill")
    return [float(sum(image.convert("L").tobytes())) for image in images]
"""


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "fragile_rewards.py").write_text(REWARDS)
    (tmp_path / "config.yaml").write_text("reward_funcs: [fragile_rewards:fragile]\nlearning_rate: 1.0e-3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = SMALL[: SMALL.index("--reward_funcs")] + ["--save_strategy", "no"]
    line = ["compare", "--arms", "grpo", "--seeds", "1", *small, "--config", "config.yaml", "--output_dir", "out"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "base failed" in said and "the judge is ill" in said and "log.txt" in said
    (tmp_path / "mended").touch()
    assert main(line) == 0
    assert (tmp_path / "out" / "comparison.md").exists()
    # The file is noticed when it changes, for arms would differ in more than their advantages.
    (tmp_path / "config.yaml").write_text("reward_funcs: [fragile_rewards:fragile]\nlearning_rate: 2.0e-3\n")
    assert main(line) == 2
    assert "'learning_rate': 0.002" in capsys.readouterr().err


@pytest.mark.slow
def test_after_an_interruption_the_same_command_goes_on(tmp_path, capsys):
    line = ["compare", "--arms", "linear", "--seeds", "1", *SMALL, "--max_steps", "6", "--output_dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "slas_trl.cli.main", *line],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    evaluations = tmp_path / "linear" / "seed-42" / "evaluations.json"
    deadline = time.monotonic() + 200
    while not (evaluations.exists() and "2" in read(evaluations)["evaluations"]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(100) == 130
    assert process.stderr is not None
    said = process.stderr.read()
    assert "interrupted" in said and "Install torchvision" not in said
    interrupted = read(evaluations)
    assert len(interrupted["evaluations"]) < 6
    assert main(line) == 0
    assert "1 of 2 runs to do" in capsys.readouterr().out
    resumed = read(tmp_path / "linear" / "seed-42" / "result.json")
    assert sorted(resumed["evaluations"], key=int) == list("123456")
    assert resumed["evaluations"]["2"] == interrupted["evaluations"]["2"]
    assert resumed["first_rollout"] == interrupted["first_rollout"]
    assert list((tmp_path / "linear" / "seed-42").glob("checkpoint-*"))  # that it went on from


def test_arms():
    names = [arm.name for arm in arms_of(["grpo", "linear", "slas"], [0.25, 1.0])]
    assert names == ["grpo", "linear", "slas-0.25", "slas-1"]
    assert "constant" in arms_of(["grpo"], [])[0].options  # whatever schedule the slas arms have
    with pytest.raises(ValueError, match="got 'ppo'"):
        arms_of(["ppo"], [])
    with pytest.raises(ValueError, match="slas-0.5 twice"):
        arms_of(["slas"], [0.5, 0.5])
    with pytest.raises(ValueError, match="--gammas is empty"):
        arms_of(["slas"], [])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gamma", "0.5"], "--gammas"),
        (["--scale_rewards=group"], "--arms"),
        (["--arms", "grpo,best"], "got 'best'"),
        (["--learning_rat", "1e-3"], "--learning_rate"),
        (["--eval_prompts", "1000"], "120 held-out prompts"),
        (["--reward_funcs", "no_such_reward"], "no_such_reward"),
        (["--model_name_or_path", "somewhere"], "--reward_funcs is missing"),
        (["--gamma_schedule", "ess", "--gammas", "0.5,1"], "give one of them"),
        (["--gamma_schedule", "kl", "--gammas", "0.5,2"], "gamma_max"),
    ],
)
def test_bad_input(argv, said, capsys, tmp_path):
    assert main(["compare", "--output_dir", str(tmp_path / "out"), *argv]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--gammas", "0"], ["--gammas", "much"], ["--seeds", "0"], ["--processes", "two"]])
def test_values_that_do_not_fit(argv, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(argv)
    assert argv[0] in capsys.readouterr().err


def test_a_file_for_training_may_not_upload(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("push_to_hub: true\ngamma: 0.7\n")
    assert main(["compare", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "push_to_hub would be one for all arms" in capsys.readouterr().err


def test_several_gpus_are_no_obstacle(monkeypatch, capsys, tmp_path):
    """The options are read as an arm reads them, which sees one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    more = property(lambda args: 1 + os.environ["CUDA_VISIBLE_DEVICES"].count(","))
    monkeypatch.setattr(SLASConfig, "n_gpu", more)
    assert main(["compare", "--eval_prompts", "1000", "--output_dir", str(tmp_path)]) == 2
    assert "120 held-out prompts" in capsys.readouterr().err

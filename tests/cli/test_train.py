"""`slas-trl train`, from the command line to the last file of the run."""

import contextlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from slas_trl.cli.main import main
from slas_trl.run_files import ADAPTER
from slas_trl.scripts.arguments import SHAPES_SETTINGS, parse
from slas_trl.shapes.world import CATEGORIES
from tests.cli.tiny_run import PROMPTS, REWARDS, SMALL, make_home


MORE_REWARDS = """
import math

def never(prompts, images, **columns):
    return [math.nan for _ in images]

def greenness(prompts, images, **columns):
    return [image.convert("RGB").resize((1, 1)).getpixel((0, 0))[1] / 255 for image in images]
"""
SETTINGS = {"reward_funcs": ["tiny_rewards:darkness", "tiny_rewards:redness"], "reward_weights": [1.0, 0.0]}
# Another lora_alpha than lora_r: the scale has to survive saving.
SETTINGS |= {"use_peft": True, "lora_r": 4, "lora_alpha": 16, "learning_rate": "1e-2", "report_images_per_prompt": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"), "tiny_rewards", REWARDS + MORE_REWARDS, **SETTINGS)


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def finished(home: Path) -> str:
    """What `slas-trl train --config run.yaml` printed."""
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["train", "--config", "run.yaml"]) == 0
    return printed.getvalue()


def run_code(card: Path) -> dict:
    """Run the code that a model card tells people to run, and return its variables."""
    [code, *_] = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    return names


class TestARun:
    def test_leaves_everything(self, finished):
        run = Path("run")
        files = [ADAPTER, "README.md", "metrics.jsonl", "training.png", "evaluation.json"]
        files += ["calibration.jsonl", "calibration.png"]
        assert all((run / name).is_file() for name in files) and (run / "checkpoint-2").is_dir()
        with Image.open(run / "samples" / "comparison.png") as sheet:
            assert sheet.width > 700 and sheet.height > 1400  # before and after of 4 prompts, and their captions
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "reward" in record] == [1, 2]
        before, after = (np.asarray(Image.open(f"run/samples/1_{name}.png")) for name in ("before", "after"))
        assert before.shape == after.shape and (before != after).any()

    def test_the_table_is_printed_and_true(self, finished, monkeypatch):
        assert "4 training prompts, 2 pictures each" in finished
        scores = json.loads(Path("run/evaluation.json").read_text())
        assert list(scores) == ["darkness", "redness"]
        row = next(line for line in finished.splitlines() if line.startswith("| darkness"))
        for when, cell in zip(("before", "after"), row.split("|")[2:4], strict=True):
            assert cell.split()[0] == f"{scores['darkness'][when]['mean']:.4f}"

        # The same pictures, made again with the adapter that was saved, by diffusers alone.
        monkeypatch.syspath_prepend(".")
        from tiny_rewards import darkness

        pipe = DiffusionPipeline.from_pretrained("model")
        for when in ("before", "after"):
            prompts = [prompt for prompt in PROMPTS for _ in range(2)]
            generators = [torch.Generator().manual_seed(i) for i in range(8)]
            images = pipe(prompts, generator=generators, num_inference_steps=3, height=16, width=16).images
            assert np.mean(darkness(prompts, images)) == pytest.approx(scores["darkness"][when]["mean"], abs=1e-4)
            if when == "before":
                pipe.load_lora_weights("run")
        assert scores["darkness"]["before"]["mean"] != scores["darkness"]["after"]["mean"]

    def test_the_card_says_what_was_done(self, finished):
        card = ModelCard.load(Path("run/README.md"))
        assert "lora" in card.data.tags and card.data.library_name == "diffusers"
        assert "base_model" not in card.data.to_dict()  # "model" is a folder, not on the Hub
        assert "| `darkness` | 1 |" in card.text and "| `redness` | held out |" in card.text
        settings = {"gamma": "0.5", "eta": "1", "lora_alpha": "16", "updates": "2"}
        assert all(f"`{name}` **{value}**" in card.text for name, value in settings.items())
        assert all(part in card.text for part in ("| darkness |", "](training.png)", "](calibration.png)"))
        assert isinstance(run_code(Path("run/README.md"))["image"], Image.Image)

    def test_the_adapter_is_there_for_generate(self, finished, capsys):
        argv = ["generate", "--prompt", "a dot", "--model_name_or_path", "model", "--num_inference_steps", "2"]
        assert main([*argv, "--output", "plain.png"]) == 0
        assert main([*argv, "--output", "tuned.png", "--adapter", "run"]) == 0
        assert main([*argv, "--output", "tuned3.png", "--adapter", "run", "--num_images", "3"]) == 0
        plain, tuned, sheet = (Image.open(name) for name in ("plain.png", "tuned.png", "tuned3.png"))
        assert plain.size == tuned.size and plain.tobytes() != tuned.tobytes() and sheet.width > 2 * 160
        assert "Wrote tuned3.png" in capsys.readouterr().out

    def test_resumes_from_the_newest_checkpoint(self, finished):
        shutil.copytree("run", "resumed")
        argv = ["train", "--config", "run.yaml", "--output_dir", "resumed", "--max_steps", "3"]
        assert main([*argv, "--report_prompts", "0", "--resume_from_checkpoint", "true"]) == 0
        records = [json.loads(line) for line in Path("resumed/metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "reward" in record] == [1, 2, 3]


def test_full_fine_tuning_with_evaluation_prompts(capsys):
    Path("held_out.txt").write_text("a bar\na box\n")
    argv = ["train", "--config=run.yaml", "--use_peft", "false", "--output_dir", "full", "--max_steps", "1"]
    argv += ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_dataset_name", "held_out.txt"]
    assert main([*argv, "--eval_reward_funcs", "tiny_rewards.py:greenness", "--learning_rate", "1e-3"]) == 0
    assert "on 2 evaluation prompts" in capsys.readouterr().out
    assert "eval_rewards/greenness/mean" in Path("full/metrics.jsonl").read_text()
    assert not Path("full", ADAPTER).exists()
    assert isinstance(run_code(Path("full/README.md"))["image"], Image.Image)
    card = ModelCard.load(Path("full/README.md"))
    assert "lora" not in card.data.tags and "| `greenness` | held out |" in card.text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--num-generation=8"], ["--num_generation", "--num_generations"]),
        (["--config", "typo.yaml"], ["learning_rat", "typo.yaml", "learning_rate"]),
        (["--config", "broken.yaml"], ["broken.yaml", "YAML"]),
        (["--config", "list.yaml"], ["list.yaml", "list"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["stray"], ["'stray'"]),
        (["--max_steps", "many"], ["--max_steps", "'many'"]),
        (["--scale_rewards", "all"], ["--scale_rewards", "'all'"]),
        (["--lora_alpha", "0"], ["lora_alpha"]),
        (["--num_generations", "3"], ["8 images", "(3)"]),
        (["--reward_funcs", "brightnes"], ["'brightnes'", "brightness"]),
        (["--reward_funcs", "brightness,ocr"], ["separated by spaces"]),
        (["--config", "colon.yaml"], ["space after the colon"]),
        (["--report_prompts", "-1"], ["report_prompts"]),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("-") else None,
)
def test_bad_options_are_named(options, named):
    files = {"typo": "learning_rat: 1", "broken": "a: [1", "list": "- a", "colon": "reward_funcs:\n  - ocr: a=b"}
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)
    config = [] if "--config" in options else ["--config", "run.yaml"]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        parse([*config, *options])
    assert all(part in str(error.value) for part in named)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dataset_name", "nowhere.txt"], ["nowhere.txt"]),
        (["--eval_strategy", "steps", "--eval_steps", "1"], ["--eval_dataset_name"]),
        (["--eval_reward_funcs", "tiny_rewards:redness"], ["eval_strategy"]),
        (["--reward_funcs", "tiny_rewards:darknes"], ["tiny_rewards:darknes"]),
        (["--reward_funcs", "tiny_rewards:never", "--reward_weights", "1", "--report_prompts", "0"], ["never", "NaN"]),
        (["--lora_dropout", "0.1"], ["lora_dropout"]),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("-") else None,
)
def test_bad_input_gets_one_message_and_writes_nothing(options, named, capsys):
    assert main(["train", "--config", "run.yaml", "--output_dir", "refused", *options]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "slas-trl train: error: " in message
    assert all(part in message for part in named)
    assert not any(Path("refused").rglob("*"))  # the Trainer may have made the folder


def test_the_command_line_overrides_the_yaml_file():
    script, lora, config = parse(["--config", "run.yaml", "--gamma", "0.25", "--lora-r", "2"])
    assert (config.gamma, lora.lora_r, lora.lora_alpha) == (0.25, 2, 16)
    assert script.reward_funcs == SETTINGS["reward_funcs"]
    assert config.learning_rate == 1e-2  # "1e-2" is a string to YAML


def test_a_report_that_cannot_be_written(capsys):
    Path("no_card/README.md").mkdir(parents=True)
    argv = ["train", "--config", "run.yaml", "--output_dir", "no_card", "--max_steps", "1", "--report_prompts", "1"]
    assert main([*argv, "--save_strategy", "no", "--report_images_per_prompt", "1"]) == 2
    said = capsys.readouterr()
    assert "The report could not be written" in said.err
    assert "1 training prompt, 1 picture each" in said.out and "Each rollout is 8 images of 3 steps" in said.out


def test_only_the_embedded_pipeline_has_its_settings():
    script, lora, config = parse([])
    assert script.dataset_name == "shapes" and lora.use_peft
    assert config.learning_rate == SHAPES_SETTINGS["learning_rate"]
    assert parse(["--learning_rate", "1e-4"])[2].learning_rate == 1e-4
    assert parse(["--reward_funcs", "shapes_clip"])[2].reward_weights is None
    script, lora, config = parse(["--model_name_or_path", "model"])
    assert script.dataset_name is None and not lora.use_peft
    assert config.learning_rate != SHAPES_SETTINGS["learning_rate"]
    assert parse(["--model_name_or_path", "shapes"])[0].model_name_or_path is None  # another name of the default


def test_a_file_may_set_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SLAS_TRL_TEST", "before")
    (tmp_path / "run.yaml").write_text("env:\n  SLAS_TRL_TEST: 3\ngamma: 0.25\n")
    assert parse([f"--config={tmp_path / 'run.yaml'}"])[2].gamma == 0.25 and os.environ["SLAS_TRL_TEST"] == "3"


def test_the_embedded_pipeline_is_the_default(tmp_path, capsys, monkeypatch):
    argv = ["train", *SMALL, "--output_dir", str(tmp_path / "shapes"), "--max_steps", "1"]
    assert main([*argv, "--report_prompts", "12", "--report_images_per_prompt", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n| {name} " in printed for name in (*CATEGORIES, "overall")) and "12 held-out prompts" in printed
    monkeypatch.chdir(tmp_path / "shapes")  # which is not below the folder that it was started in
    scores = json.loads(Path("evaluation.json").read_text())
    assert 0 <= scores["before"]["estimates"]["overall"]["graded"]["mean"] <= 1
    record = json.loads(Path("metrics.jsonl").read_text().splitlines()[0])
    assert record["reward"] == pytest.approx(record["rewards/shapes_verifier/mean"])  # the other has weight 0
    assert "rewards/shapes_clip/mean" in record
    assert run_code(Path("README.md"))["image"].size == (32, 32)
    [result] = ModelCard.load("README.md").data.eval_results[:1]
    assert result.metric_value == scores["after"]["estimates"]["overall"]["graded"]["mean"]

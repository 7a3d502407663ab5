"""`slas-trl prompts`: from a list of prompts to a shorter one that is trained on."""

import json
import os
import signal
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from datasets import Dataset
from PIL import Image

from slas_trl.cli.main import main
from slas_trl.scripts.prompt_scores import Selection, read_scores, write_prompts
from slas_trl.shapes import shapes_prompts
from slas_trl.trainer.prompts import load_prompts
from tests.cli.test_train import SETTINGS
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import sd_pipeline


PROMPTS = [{"prompt": p, "tag": i} for i, p in enumerate(["a dot", "a box", "dots", "a bar", "bars"])]
REWARDS = """
import os, signal
from pathlib import Path

def darkness(prompts, images, **columns):
    return [1 - sum(image.convert("L").tobytes()) / (255 * image.width * image.height) for image in images]

def tagged(prompts, images, tag, **columns):
    # The same for all images of the first prompt; two values for the second; none for the third.
    return [None if t == 2 else 1.0 if t == 0 else i % 2 if t == 1 else d
            for i, (t, d) in enumerate(zip(tag, darkness(prompts, images)))]

def killed_once(prompts, images, **columns):
    if "dots" in prompts and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return darkness(prompts, images)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    sd_pipeline().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    (folder / "prompt_rewards.py").write_text(REWARDS)
    rewards = {"reward_funcs": ["prompt_rewards:darkness", "prompt_rewards:tagged"], "reward_weights": [0.5, 1.0]}
    settings = {**SETTINGS, **rewards, "dataset_name": "prompts.jsonl", "disable_tqdm": True}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def scored(home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sys, "path", [*sys.path])
        assert main(["prompts", "score", "--config", "run.yaml", "--output", "scores.jsonl"]) == 0
    return home / "scores.jsonl"


def score(*options: str, output: str) -> list[str]:
    assert main(["prompts", "score", "--config", "run.yaml", "--output", output, *options]) == 0
    return Path(output).read_text().splitlines()


def fail(capsys: pytest.CaptureFixture, *argv: str) -> str:
    assert main(["prompts", *argv]) == 2
    return capsys.readouterr().err


class TestScore:
    def test_a_line_for_each_prompt(self, scored):
        header, lines = read_scores(scored)
        assert header["prompts"] == 5 and header["num_generations"] == 4
        assert [lines[row]["prompt"] for row in range(5)] == [row["prompt"] for row in PROMPTS]
        tagged = [lines[row]["rewards"]["tagged"] for row in range(5)]
        assert tagged[0] == {"mean": 1.0, "std": 0.0, "distinct": 0.25}
        assert tagged[1] == {"mean": 0.5, "std": 0.5, "distinct": 0.5}
        assert tagged[2] == {"mean": None, "std": None, "distinct": None}
        for line in lines.values():
            darkness = line["rewards"]["darkness"]
            # From one initial noise: only the noise of the steps, as in training, makes a difference.
            assert darkness["std"] > 1e-4 and darkness["distinct"] == 1.0
        # The weighted sum, of what there is.
        for row, weight in ((0, 0.5), (2, 0.5), (3, 1.5)):
            assert lines[row]["std"] == pytest.approx(weight * lines[row]["rewards"]["darkness"]["std"], rel=1e-3)
        assert lines[3]["mean"] == pytest.approx(1.5 * lines[3]["rewards"]["darkness"]["mean"], rel=1e-5)

    def test_nothing_else_is_written(self, scored, home):
        names = {path.name for path in home.iterdir()} - {"__pycache__"}
        assert "run" not in names and "scores.jsonl" in names

    def test_it_is_repeatable_and_depends_on_the_seed(self, scored):
        assert score(output="again.jsonl") == scored.read_text().splitlines()
        assert score("--seed", "1", output="other.jsonl")[1] != scored.read_text().splitlines()[1]

    def test_what_is_there_is_not_computed_again(self, scored, capsys):
        lines = scored.read_text().splitlines(keepends=True)
        Path("some.jsonl").write_text("".join(lines[:3]).replace('"a box"', '"marked"') + lines[3][:40])
        after = score(output="some.jsonl")
        assert (
            after[2] == lines[2].rstrip().replace('"a box"', '"marked"')
            and after[3:] == scored.read_text().splitlines()[3:]
        )
        assert "Wrote some.jsonl: 5 prompts, 4 images each, 5 with two scores or more." in capsys.readouterr().out

    def test_a_kill_loses_nothing_that_was_computed(self, scored, home):
        argv = ["--reward_funcs", "prompt_rewards:killed_once", "--reward_weights", "1"]
        child = os.fork()
        if child == 0:
            try:
                score(*argv, output="k.jsonl")
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        before = Path("k.jsonl").read_text().splitlines()
        assert len(before) == 3  # two prompts at once
        after = score(*argv, output="k.jsonl")
        assert after[:3] == before and after == score(*argv, output="whole.jsonl")

    def test_other_settings_are_not_mixed_with_these(self, scored, capsys):
        for options, named in (
            (["--num_generations", "8"], "num_generations"),
            (["--reward_weights", "1", "0"], "reward_weights"),
            (["--dataset_name", "fewer.jsonl"], "fingerprint"),
        ):
            Path("fewer.jsonl").write_text("\n".join(map(json.dumps, PROMPTS[:4])))
            message = fail(capsys, "score", "--config", "run.yaml", "--output", "scores.jsonl", *options)
            assert "scores.jsonl holds scores that were made with other settings" in message and named in message
        assert "does not begin" in fail(capsys, "score", "--config", "run.yaml", "--output", "prompts.jsonl")
        assert [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()] == PROMPTS  # as it was

    def test_bad_input(self, capsys):
        assert "must end in .jsonl" in fail(capsys, "score", "--output", "scores.csv")
        assert "does not exist" in fail(capsys, "score", "--output", "no/scores.jsonl")
        argv = ["score", "--output", "x.jsonl"]
        assert "Did you mean --seed?" in fail(capsys, *argv, "--sede", "1")
        assert "--reward_funcs is missing" in fail(capsys, *argv, "--model_name_or_path", "model")
        assert not Path("x.jsonl").exists()

    def test_the_embedded_pipeline_is_the_default(self, tmp_path):
        (tmp_path / "few.txt").write_text("\n".join(shapes_prompts("test")["prompt"][:2]))
        argv = ["--dataset_name", str(tmp_path / "few.txt"), "--num_generations", "4", "--disable_tqdm", "true"]
        assert main(["prompts", "score", "--output", str(tmp_path / "s.jsonl"), *argv]) == 0
        header, lines = read_scores(tmp_path / "s.jsonl")
        assert header["sde_window_size"] == 4 and set(lines[1]["rewards"]) == {"shapes_verifier", "shapes_clip"}
        assert lines[1]["mean"] == pytest.approx(lines[1]["rewards"]["shapes_verifier"]["mean"])

    def test_image_editing(self, tmp_path):
        """Images reach the pipeline and the rewards; paths stay relative to the list that names them."""
        (tmp_path / "photos").mkdir()
        (tmp_path / "lists").mkdir()
        for i, colour in enumerate(["red", "green", "blue"]):
            Image.new("RGB", (16, 16), colour).save(tmp_path / "photos" / f"{i}.png")
        edits = [{"prompt": "more colour", "image": f"photos/{i}.png"} for i in range(3)]
        (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)))
        family = FAMILIES["kontext"]
        family.build().save_pretrained(tmp_path / "model")
        call = {k: v for k, v in family.call.items() if k not in ("height", "width", "guidance_scale")}
        argv = ["--dataset_name", str(tmp_path / "edits.jsonl"), "--model_name_or_path", str(tmp_path / "model")]
        argv += ["--pipeline_kwargs", json.dumps(call), "--height", "16", "--width", "16", "--num_generations", "4"]
        argv += [
            "--per_device_train_batch_size",
            "2",
            "--num_inference_steps",
            "3",
            "--use_cpu",
            "--disable_tqdm",
            "true",
        ]
        argv += ["--reward_funcs", "examples.image_editing:layout"]
        scores, kept = str(tmp_path / "s.jsonl"), tmp_path / "lists" / "kept.jsonl"
        assert main(["prompts", "score", "--output", scores, *argv]) == 0
        assert main(["prompts", "filter", "--scores", scores, "--output", str(kept), "--keep_top", "0.6"]) == 0
        images = [json.loads(line)["image"] for line in kept.read_text().splitlines()]
        assert len(images) == 2 and all(image.startswith("../photos/") for image in images)
        assert all(Path(row["image"]).is_file() for row in load_prompts(str(kept)))


class TestFilter:
    def test_the_trainer_trains_on_what_is_kept(self, scored, capsys):
        argv = ["filter", "--scores", "scores.jsonl", "--output", "kept.jsonl", "--reward", "tagged"]
        assert main(["prompts", *argv, "--min_std", "1e-5", "--max_mean", "0.999"]) == 0
        printed = capsys.readouterr().out
        assert "Kept 3 of 5 prompts in kept.jsonl (dropped: 2 std below 1e-05; 0 mean above 0.999)." in printed
        kept = load_prompts("kept.jsonl")
        assert kept.to_list() == [PROMPTS[row] for row in (1, 3, 4)]
        train = ["train", "--config", "run.yaml", "--dataset_name", "kept.jsonl", "--output_dir", "kept_run"]
        assert main([*train, "--report_prompts", "0", "--max_steps", "1"]) == 0
        assert "on 3 prompts" in capsys.readouterr().out
        assert json.loads(Path("kept_run/metrics.jsonl").read_text().splitlines()[0])["rewards/tagged/std"] > 0

    def test_by_the_weighted_sum(self, scored):
        _, lines = read_scores(scored)
        widest = max(lines, key=lambda row: lines[row]["std"])
        argv = ["prompts", "filter", "--scores", "scores.jsonl", "--keep_top", "0.2", "--output"]
        assert main([*argv, "one.txt"]) == 2  # which cannot hold the tags
        assert main([*argv, "one.parquet"]) == 0
        assert load_prompts("one.parquet").to_list() == [PROMPTS[widest]] and widest == 1

    def test_nothing_is_left(self, scored, capsys):
        message = fail(capsys, "filter", "--scores", "scores.jsonl", "--output", "none.jsonl", "--min_std", "9")
        assert "no prompt is left of 5 (dropped: 5 std below 9.0). The largest std is 0." in message
        assert not Path("none.jsonl").exists()

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"--min_std": None}, "nothing to filter by"),
            ({"--min_std": None, "--keep_top": "1.5"}, "--keep_top must be a share in (0, 1], got 1.5"),
            ({"--output": "kept.csv"}, "must end in one of"),
            ({"--output": "no/kept.jsonl"}, "the folder no"),
            ({"--output": "prompts.jsonl"}, "would replace what it is made from"),
            ({"--scores": "nowhere.jsonl"}, "there are no scores nowhere.jsonl"),
            ({"--scores": "prompts.jsonl"}, "does not begin"),
            ({"--scores": "unfinished.jsonl"}, "has scores of 2 of 5 prompts"),
            ({"--reward": "beauty"}, "no scores of --reward beauty, only of darkness, tagged"),
            ({"--dataset_name": "others.txt"}, "are not those that were scored"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
    )
    def test_bad_input(self, scored, capsys, options, expected):
        Path("unfinished.jsonl").write_text("".join(scored.read_text().splitlines(keepends=True)[:3]))
        Path("others.txt").write_text("a cat\n")
        given = {"--scores": "scores.jsonl", "--output": "x.jsonl", "--min_std": "0.1", **options}
        argv = [word for name, value in given.items() if value is not None for word in (name, value)]
        assert expected in fail(capsys, "filter", *argv)
        assert not Path("x.jsonl").exists()

    def test_conditions(self):
        stds, means = [0.0, 0.1, 0.2, 0.3, None], [0.0, 0.5, 0.9, 1.0, None]
        scores = {
            i: {"std": std, "mean": mean, "distinct": (i + 1) / 8}
            for i, (std, mean) in enumerate(zip(stds, means, strict=True))
        }
        assert Selection(min_std=0.1).rows(scores)[0] == [1, 2, 3]  # as min_group_std, the bound itself is kept
        assert Selection(min_distinct=0.5).rows(scores)[0] == [3, 4]
        assert Selection(min_mean=0.1, max_mean=0.95).rows(scores)[0] == [1, 2]
        assert Selection(keep_top=0.4).rows(scores)[0] == [2, 3]
        kept, dropped = Selection(min_std=0.1, max_mean=0.95, keep_top=0.5).rows(scores)
        assert kept == [2] and list(dropped.values()) == [2, 1, 1]

    def test_images_within_the_data_set_need_parquet(self, tmp_path):
        data = Dataset.from_dict(
            {"prompt": ["a", "b"], "image": [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]}
        )
        with pytest.raises(ValueError, match="hold images, not paths; name .*kept.parquet"):
            write_prompts(data, [1], tmp_path / "kept.jsonl")
        write_prompts(data, [1], tmp_path / "kept.parquet")
        kept = load_prompts(str(tmp_path / "kept.parquet"))
        assert isinstance(kept.features["image"], datasets.Image)
        assert kept["prompt"][:] == ["b"] and np.asarray(kept[0]["image"])[0, 0].tolist() == [0, 0, 255]


def test_without_a_command_it_prints_its_help(capsys):
    assert main(["prompts"]) == 0
    printed = capsys.readouterr().out
    assert "score" in printed and "filter" in printed
    for command in ("score", "filter"):
        with pytest.raises(SystemExit, match="0"):
            main(["prompts", command, "--help"])
        assert "--output" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["prompts", "socre"])


def test_prompts_may_hold_other_ends_of_lines(tmp_path):
    lines = [{"fingerprint": "x"}, {"row": 0, "prompt": "one\u2028two\x85three"}, {"row": 1, "prompt": "four"}]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert read_scores(path)[1] == {0: lines[1], 1: lines[2]}

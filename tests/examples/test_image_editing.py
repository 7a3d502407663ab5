"""The example runs as it stands, on a small pipeline of its kind, and so does `slas-trl prompts` on its data."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.image_editing import layout, main, vividness
from slas_trl.cli.main import main as slas_trl
from slas_trl.trainer.prompts import load_prompts
from tests.policy.zoo.all import FAMILIES
from tests.trainer.tiny_trainers import logged


@pytest.fixture
def edits(tmp_path):
    (tmp_path / "photos").mkdir()
    lines = []
    for i, color in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (16, 16), color).save(tmp_path / "photos" / f"{i}.png")
        lines.append({"prompt": "make it more colorful", "image": f"photos/{i}.png"})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "edits.jsonl"


def test_it_trains(tmp_path, edits):
    family = FAMILIES["kontext"]
    family.build().save_pretrained(tmp_path / "model")
    call = {key: value for key, value in family.call.items() if key not in ("height", "width", "guidance_scale")}
    argv = ["--dataset_name", str(edits), "--model_name_or_path", str(tmp_path / "model"), "--use_cpu"]
    argv += ["--disable_tqdm", "true", "--pipeline_kwargs", json.dumps(call), "--height", "16", "--width", "16"]
    argv += ["--num_generations", "4"]
    training = ["--model_init_kwargs", "{}", "--bf16", "false", "--steps_per_generation", "4", "--max_steps", "1"]
    main([*argv, *training, "--save_strategy", "no", "--output_dir", str(tmp_path / "run")])
    (line,) = logged(tmp_path / "run")
    assert line["ratio/max_deviation"] == 0.0 and line["rewards/layout/std"] > 0 and line["rewards/vividness/std"] > 0
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()

    # Scored, paths are relative to the file that is written.
    (tmp_path / "lists").mkdir()
    scores = tmp_path / "lists" / "s.jsonl"
    scoring = ["--num_inference_steps", "3", "--reward_funcs", "examples.image_editing:layout"]
    scoring += ["--per_device_train_batch_size", "2", "--output", str(scores)]
    assert slas_trl(["prompts", "score", *argv, *scoring]) == 0
    assert all(json.loads(line)["image"].startswith("../photos/") for line in scores.read_text().splitlines())
    assert all(Path(row["image"]).is_file() for row in load_prompts(str(scores)))


def test_its_rewards():
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))).convert("RGB")
    mirrored = ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert layout(["x"] * 2, [ramp, mirrored], image=[ramp, ramp]) == pytest.approx([1.0, -1.0])
    red, gray = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "gray")
    assert vividness(["x"] * 2, [red, gray]) == [1.0, 0.0]


def test_what_it_needs():
    with pytest.raises(SystemExit, match="--dataset_name is missing"):
        main(["--bf16", "false", "--use_cpu"])

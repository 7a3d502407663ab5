"""`--adapter`: training, and what else takes its options, from an adapter that was published."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from slas_trl.cli.main import main
from slas_trl.loading import load_pipeline
from slas_trl.run_files import ADAPTER
from slas_trl.scripts.arguments import parse
from slas_trl.scripts.compare_arm import run_arm
from slas_trl.trainer import adapters as lora
from tests.cli.tiny_run import RUN, make_home
from tests.local_hub import HubServer
from tests.tiny_pipelines import sd_pipeline
from tests.trainer.tiny_trainers import publish


SETTINGS = {"adapter": "published", "reward_funcs": ["adapter_rewards:darkness"], "beta": 0.1, "learning_rate": 1e-2}
SETTINGS |= {"report_images_per_prompt": 1, "log_completions": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = make_home(tmp_path_factory.mktemp("home"), "adapter_rewards", **SETTINGS)
    publish(sd_pipeline(), ["unet"], folder / "published")
    return folder


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / ADAPTER)


def test_train_goes_on_from_it(capsys):
    assert main(["train", "--config", "run.yaml"]) == 0
    assert "Training model, from the adapter published, on 4 prompts" in capsys.readouterr().out
    assert weights("run").keys() == weights("published").keys()
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    kl = [line["kl"] for line in lines if "kl" in line]
    assert kl[0] == 0.0 and kl[1] > 0.0
    card = Path("run/README.md").read_text()
    assert "Training went on from the adapter `published`." in card and str(Path.cwd()) not in card

    assert main(["doctor", "--config", "run.yaml", "--kl_reference", "base"]) == 0
    report = " ".join(capsys.readouterr().out.split())
    assert "trained adapter: " in report and "Training can start." in report
    assert "KL to reference" in report and "KL to reference 0 nats" not in report


def test_generate_writes_no_picture_that_shows_nothing(capsys):
    pipe = sd_pipeline()
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.weight, math.nan)
    pipe.save_pretrained("broken")
    argv = ["generate", "--prompt", "a dot", "--num_inference_steps", "2", "--output", "none.png"]
    assert main([*argv, "--model_name_or_path", "broken", "--num_images", "2"]) == 2
    assert "2 of 2 pictures show nothing: the decoder (vae in torch.float32) made NaN" in capsys.readouterr().err
    assert not Path("none.png").exists()


def test_prompts_are_scored_with_it():
    config = {key: value for key, value in (RUN | SETTINGS).items() if key != "adapter"}
    Path("plain.yaml").write_text(yaml.safe_dump(config))
    argv = ["prompts", "score", "--config", "plain.yaml", "--output"]
    assert main([*argv, "plain.jsonl"]) == main([*argv, "adapted.jsonl", "--adapter", "published"]) == 0
    plain, adapted = (Path(f"{name}.jsonl").read_text().splitlines() for name in ("plain", "adapted"))
    assert json.loads(plain[0])["mean"] != json.loads(adapted[0])["mean"]
    assert main([*argv, "adapted.jsonl"]) == 2  # other scores


def test_an_arm_of_a_comparison_is_compared_with_it():
    """The base of all arms is the model with the adapter, even if the loss has another reference."""
    found = {}
    for rate in ("0", "1e-2"):
        folder = Path(f"arm-{rate}")
        folder.mkdir()
        options = ["--learning_rate", rate, "--kl_reference", "base", "--eval_dataset_name", "prompts.txt"]
        spec = {"arm": "linear", "seed": 3, "options": options, "eval_every": 1, "eval_prompts": 2}
        spec |= {"eval_images_per_prompt": 1, "config": {**RUN, **SETTINGS, "max_steps": 1}}
        (folder / "arm.json").write_text(json.dumps(spec))
        run_arm(folder)
        found[rate] = json.loads((folder / "result.json").read_text())["evaluations"]["1"]["kl"]
        assert not any(lora.REFERENCE_NAME in key for key in weights(str(folder)))
    assert found["0"] == 0.0 < found["1e-2"]


def test_generate_takes_the_base_that_the_card_names(capsys, tmp_path, monkeypatch):
    argv = ["generate", "--prompt", "a dot", "--num_inference_steps", "2"]
    with HubServer(tmp_path / "hub") as hub, hub.in_process():
        for name in ("model", "published"):
            huggingface_hub.create_repo(f"user/{name}")
        huggingface_hub.upload_folder(repo_id="user/model", folder_path="model")
        Path("card.md").write_text("---\nbase_model: user/model\n---\n")
        huggingface_hub.upload_folder(repo_id="user/published", folder_path="published")
        huggingface_hub.upload_file(path_or_fileobj="card.md", path_in_repo="README.md", repo_id="user/published")
        assert main([*argv, "--output", "hub.png", "--adapter", "user/published"]) == 0
        assert "The card of user/published names user/model as its base model" in capsys.readouterr().out
        settings = [f"--{key}={value}" for key, value in RUN.items() if key.startswith(("num_", "per_", "steps"))]
        train = ["train", *settings, "--reward_funcs", "adapter_rewards:darkness", "--adapter", "user/published"]
        assert main([*train, "--output_dir", "refused"]) == 2
        assert "add --model_name_or_path user/model" in capsys.readouterr().err
        huggingface_hub.create_repo("user/hidden", private=True)
        huggingface_hub.upload_folder(repo_id="user/hidden", folder_path="published")
        monkeypatch.delenv("HF_TOKEN")
        private = [*train[:-1], "user/hidden", "--output_dir", "private", "--model_name_or_path", "model"]
        private += ["--report_prompts", "0", "--max_steps", "1"]
        assert main(private) == 2
        assert main([*private, "--hub_token", "hf_good"]) == 0
    argv += ["--model_name_or_path", "model"]
    assert main([*argv, "--output", "here.png", "--adapter", "published"]) == 0
    assert main([*argv, "--output", "plain.png"]) == 0
    assert main([*argv, "--output", "bf16.png", "--adapter", "published", "--dtype", "bfloat16"]) == 0
    pipe: Any = load_pipeline("model", {"dtype": "bfloat16"})
    pipe.load_lora_weights("published")
    rounded = pipe(["a dot"], num_inference_steps=2, generator=[torch.Generator().manual_seed(0)]).images[0]
    assert (np.asarray(Image.open("bf16.png")) == np.asarray(rounded)).all()
    from_hub, here, plain = (np.asarray(Image.open(f"{name}.png")) for name in ("hub", "here", "plain"))
    assert (from_hub == here).all() and (here != plain).any()


@pytest.mark.parametrize("options", [["--lora_r", "8"], ["--use_peft", "--lora-alpha=3"]])
def test_options_of_a_new_adapter_are_refused(options):
    with pytest.raises(ValueError, match=r"lora_.* would be of a new adapter, but published has"):
        parse(["--config", "run.yaml", *options])


def test_the_embedded_settings_of_a_new_adapter_give_way():
    script, new, config = parse(["--adapter", "published"])
    assert script.adapter == "published" and new.peft_config() is None
    assert config.beta == 0.01 and config.kl_reference == "initial"

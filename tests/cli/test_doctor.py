"""`slas-trl doctor`, the whole command: its figures against independent ones, and what it refuses."""

import contextlib
import importlib
import importlib.util
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import DDIMScheduler, HeunDiscreteScheduler, UNet2DConditionModel

from slas_trl import slas_advantages
from slas_trl.cli.main import main
from tests.tiny_pipelines import flux_pipeline, sd_pipeline


PROMPTS = ["a dot", "a box", "dots", "a bar"]
REWARDS = """
scores = []  # of all calls of `darkness`

def darkness(prompts, images, **columns):
    new = [1 - sum(image.convert("L").tobytes()) / (255 * image.width * image.height) for image in images]
    scores.extend(new)
    return new

def coarse(prompts, images, **columns):
    return [1000 + image.getpixel((0, 0))[0] // 64 for image in images]

def constant(prompts, images, **columns):
    return [0.5 for _ in images]

def sometimes(prompts, images, **columns):
    return [None if i % 4 == 0 else float(i) for i in range(len(images))]

def never(prompts, images, **columns):
    return [None for _ in images]

def fails(prompts, images, **columns):
    raise KeyError("no such thing")

def best_of_many(prompts, images, **columns):
    return [float(i == 0) for i in range(len(images))]
"""
SETTINGS = {
    "model_name_or_path": "sd",
    "dataset_name": "prompts.txt",
    "reward_funcs": ["doctor_rewards:darkness"],
    "use_peft": True,
    "lora_r": 4,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "num_inference_steps": 4,
    "height": 16,
    "width": 16,
    "use_cpu": True,
    "output_dir": "run",
}
EMBEDDED = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 1,
    "num_inference_steps": 4,
    "output_dir": "run",
}
FLUX = ["--model_name_or_path", "flux", "--pipeline_kwargs", '{"max_sequence_length": 8}']
# A real denoiser with a layer that drops something in train mode, where no nn.Dropout tells of it.
RANDOM_UNET = """
import torch
from diffusers import ModelMixin, UNet2DConditionModel  # the one that diffusers looks for in a module, and the base

class RandomUNet(UNet2DConditionModel):
    def forward(self, sample, *args, **kwargs):
        return super().forward(torch.nn.functional.dropout(sample, 0.1), *args, **kwargs)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's folder: models, prompts, rewards and a YAML file."""
    folder = tmp_path_factory.mktemp("home")
    sd_pipeline().save_pretrained(folder / "sd")
    flux_pipeline().save_pretrained(folder / "flux")
    pipe = sd_pipeline()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder / "broken")
    config = folder / "broken" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout": 0.1}))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "doctor_rewards.py").write_text(REWARDS)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "no_reward.yaml").write_text(yaml.safe_dump({**SETTINGS, "reward_funcs": None}))
    (folder / "embedded.yaml").write_text(yaml.safe_dump(EMBEDDED))
    (folder / "several.yaml").write_text(yaml.safe_dump({**EMBEDDED, "generation_batch_size": 64}))
    shutil.copytree(folder / "sd", folder / "random")
    (folder / "random_unet.py").write_text(RANDOM_UNET)
    index = folder / "random" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "unet": ["random_unet", "RandomUNet"]}))
    return folder


@dataclass
class Report:
    """What the command printed, and its exit status."""

    status: int
    out: str
    err: str

    def __getitem__(self, label: str) -> str:
        """The text of a row."""
        text = self.out[self.out.index(f"{label} ") + len(label) :]
        return " ".join(re.split(r"\n(?! {18})", text)[0].split())

    def cells(self, label: str) -> list[str]:
        """A line of a table."""
        line = next(line for line in self.out.splitlines() if line.startswith(f"    {label} "))
        return re.split(r" {2,}", line.strip().removeprefix(label).strip())

    @property
    def refused(self) -> list[str]:
        """What is said after the verdict, one text for each refusal."""
        _, _, listed = self.out.partition("Training cannot start:\n- ")
        return [" ".join(text.split()) for text in listed.split("\n- ")] if listed else []

    @property
    def warnings(self) -> str:
        _, _, listed = self.out.partition("Warnings:")
        return " ".join(listed.partition("Training")[0].split())


@pytest.fixture
def doctor(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Report]:
    """Runs `slas-trl doctor --config run.yaml` with further options, and looks whether it left anything behind."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {path: path.stat().st_mtime for path in home.rglob("*") if "__pycache__" not in str(path)}

    def run(*options: str, config: str = "run.yaml") -> Report:
        status = main(["doctor", "--config", config, *options])
        report = Report(status, *capsys.readouterr())
        assert "Traceback" not in report.err
        assert all(len(line) <= 100 for line in report.out.splitlines())
        after = {path: path.stat().st_mtime for path in home.rglob("*") if "__pycache__" not in str(path)}
        assert after == before  # the output_dir not made, nor a model touched
        return report

    return run


@pytest.fixture(scope="module")
def plain(home: Path) -> Report:
    """Of `slas-trl doctor --config run.yaml`."""
    out, err, path = io.StringIO(), io.StringIO(), [*sys.path]
    with contextlib.chdir(home), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["doctor", "--config", "run.yaml"])
    sys.path[:] = path
    return Report(status, out.getvalue(), err.getvalue())


class TestATrainingThatCanStart:
    def test_the_verdict(self, plain):
        assert (plain.status, plain.refused, plain.warnings) == (0, [], "")
        assert plain.out.endswith("\nTraining can start.\n")

    def test_sizes(self, plain, doctor):
        report = plain
        unet = UNet2DConditionModel.from_pretrained("sd/unet")
        total = sum(p.numel() for p in unet.parameters())
        assert report["denoiser"] == f"unet: UNet2DConditionModel, {total / 1000:.2f} k parameters, float32"
        # Rank 4 on the four projections of every attention
        adapter = sum(4 * sum(module.weight.shape) for name, module in unet.named_modules()
                      if name.endswith(("to_q", "to_k", "to_v", "to_out.0")))  # fmt: skip
        assert report["trained"] == f"LoRA, rank 4, alpha 32: {adapter / 1000:.2f} k parameters, float32"
        assert report.cells("gradients") == ["-", f"{adapter * 4 / 1024:.2f} KiB"]
        assert report.cells("optimizer (adamw_torch_fused)") == [f"{adapter * 8 / 1024:.2f} KiB"] * 2  # two moments
        assert report.cells("denoiser") == [f"{(total + adapter) * 4 / 1024:.2f} KiB"] * 2

        full = doctor("--use_peft", "false", "--optim", "sgd", "--beta", "0.1")
        assert full["trained"] == f"all weights: {total / 1000:.2f} k parameters, float32"
        assert full.cells("gradients") == ["-", f"{total * 4 / 1024:.2f} KiB"]
        assert "optimizer (sgd)" not in full.out  # it keeps nothing
        assert full["KL reference"] == "a frozen copy of the denoiser, beta 0.1"
        assert full.cells("KL reference, EMA") == [f"{total * 4 / 1024:.2f} KiB"] * 2

    def test_steps(self, doctor):
        report = doctor("--eta", "0.5")
        assert report["scheduler"] == "DDIMScheduler -> DDIMSDEScheduler, epsilon prediction, eta 0.5"
        assert report["steps"] == "4, of which trained: 3"
        stock = DDIMScheduler.from_pretrained("sd/scheduler")
        stock.set_timesteps(4)
        for i, t in enumerate(stock.timesteps):
            timestep, std, ratio, *note = report.cells(str(i))
            assert int(timestep) == t
            # The variance of DDIM, by diffusers
            expected = 0.5 * math.sqrt(stock._get_variance(int(t), int(t) - 250)) if i < 3 else 0  # the last: no noise
            assert float(std) == pytest.approx(expected, abs=1e-4)
            assert ratio == ("0" if i < 3 else "-")
            assert note == ([] if i < 3 else ["not trained: the final step (train_final_step)"])
        assert report["max |ratio - 1|"].startswith("0 before any update")

    def test_a_window_of_a_flow(self, doctor):
        report = doctor(*FLUX, "--sde_window_size", "2", "--sde_window_start", "1", "--timestep_fraction", "0.5")
        assert "FlowMatchEulerDiscreteScheduler -> FlowSDEScheduler, noise_schedule flow_grpo" in report["scheduler"]
        assert report["steps"] == (
            "4, of which trained: 1, drawn for each rollout from 2 (timestep_fraction 0.5); stochastic only in a "
            "window of 2"
        )
        assert report.out.count("outside of the window") == 2
        assert report.out.count("not drawn for this rollout") == 1

    def test_guidance(self, plain, doctor):
        assert plain["denoiser calls"] == "1 per step, of 16 samples for 8 images: guidance, 2 samples per image"
        assert doctor(*FLUX)["denoiser calls"] == "1 per step, of 8 samples for 8 images: no guidance"
        kwargs = json.dumps({"max_sequence_length": 8, "true_cfg_scale": 2.0, "negative_prompt": ["dots"] * 8})
        calls = doctor(*FLUX[:3], kwargs)["denoiser calls"]
        assert calls == "2 per step, of 8 samples for 8 images: guidance, 2 samples per image"

    @pytest.mark.parametrize(("chunk", "images"), [(8, 8), (2, 4)])
    def test_rewards(self, doctor, chunk, images):
        """On one chunk, or as many as hold a group."""
        getattr(sys.modules.get("doctor_rewards"), "scores", []).clear()
        report = doctor("--per_device_train_batch_size", str(chunk), "--steps_per_generation", "4")
        assert report["rewards"] == f"on {images} images, {images // 4} group(s) of 4"
        scores = sys.modules["doctor_rewards"].scores
        assert len(scores) == images and len(set(scores)) == images
        mean, low, high, resolution, spread, missing, weight = report.cells("darkness")
        assert [float(mean), float(low), float(high)] == pytest.approx(
            [np.mean(scores), min(scores), max(scores)], rel=1e-3
        )
        assert float(resolution) == pytest.approx(np.diff(sorted(scores)).min(), rel=1e-3)
        assert float(spread) in [pytest.approx(std, rel=1e-3) for std in np.reshape(scores, (-1, 4)).std(1)]
        assert (missing, weight) == ("0%", "1")
        for gamma, part in zip((0.5, 0.0), report["effective share"].split(","), strict=True):
            size = slas_advantages(scores, 4, gamma=gamma).abs()
            share = (size.sum() ** 2 / (images * size.square().sum())).item()
            assert float(part.split()[0]) == pytest.approx(share, abs=6e-4) and part.endswith(f"gamma {gamma:g}")

    def test_held_out_rewards_are_scored_too(self, doctor):
        held_out = ["--eval_reward_funcs", "doctor_rewards:never", "--eval_strategy", "steps"]
        report = doctor(*held_out, "--eval_dataset_name", "shapes")
        assert report.status == 0 and report.cells("never")[-2:] == ["100%", "held out"]

    def test_weights_decide_what_is_trained(self, doctor):
        """A reward of weight 0 may be without any score."""
        rewards = ["--reward_funcs", "doctor_rewards:darkness", "doctor_rewards:never"]
        report = doctor(*rewards, "--reward_weights", "2", "0")
        assert report.status == 0
        assert (report.cells("darkness")[-1], report.cells("never")[-2:]) == ("2", ["100%", "0"])

    def test_bf16(self, doctor):
        for options in ([], ["--model_init_kwargs", '{"dtype": "bfloat16"}']):
            report = doctor("--bf16", "true", *options)
            assert report.status == 0
            assert report["denoiser"].endswith("bfloat16" if options else "float32")
            assert report["trained"].endswith("float32, autocast to bf16")
            assert report["max |ratio - 1|"].startswith("0 before any update")

    def test_activations_are_measured(self, plain, doctor):
        def kibibytes(report: Report) -> float:
            number, unit = report.cells("activations")[1].split()
            return float(number) * {"KiB": 1, "MiB": 1024}[unit]

        checkpointed = doctor("--activation_checkpointing", "true")
        assert checkpointed.status == 0
        assert 0 < kibibytes(checkpointed) < kibibytes(plain) / 2
        small = doctor("--per_device_train_batch_size", "4")
        assert kibibytes(small) == pytest.approx(kibibytes(plain) / 2, rel=0.1)

    def test_the_embedded_pipeline_is_the_default(self, doctor):
        report = doctor("--use_cpu", "true", config="embedded.yaml")
        assert report.status == 0
        assert report["pipeline"] == "ShapesPipeline, the embedded one"
        assert report.cells("shapes_verifier")[-1] == "1" and report.cells("shapes_clip")[-1] == "0"
        assert "the denoiser without its adapter" in report["KL reference"]


@pytest.mark.parametrize(
    ("reward", "warning"),
    [
        ("coarse", "Reward 'coarse' resolves differences of"),
        ("constant", "In no group do the rewards differ"),
        ("best_of_many", "The effective sample share is 0.0"),
    ],
)
def test_warnings_do_not_keep_it_from_starting(doctor, reward, warning):
    options = ["--reward_funcs", f"doctor_rewards:{reward}"]
    if reward == "best_of_many":  # of 32 images, one decides
        options += ["--num_generations", "32", "--per_device_train_batch_size", "32", "--steps_per_generation", "1"]
    report = doctor(*options)
    assert report.status == 0 and warning in report.warnings


def test_missing_scores_are_counted(doctor):
    report = doctor("--reward_funcs", "doctor_rewards:sometimes")
    assert report.status == 0 and report.cells("sometimes")[-2] == "25%"


class TestRefusals:
    def test_all_of_a_pipeline_and_the_rest_is_measured(self, doctor):
        report = doctor("--model_name_or_path", "broken")
        assert report.status == 1
        order, dropout = report.refused
        assert "HeunDiscreteScheduler takes 2 model calls per step" in order
        assert "unet has dropout in 8 place(s)" in dropout
        assert report["measured"].startswith("without dropout and with the converted scheduler")
        assert report["scheduler"].startswith("HeunDiscreteScheduler -> DDIMSDEScheduler")
        assert report["max |ratio - 1|"].startswith("0 before any update")
        assert report["effective share"]

    def test_of_everything_else_at_once(self, doctor):
        report = doctor(
            *("--model_name_or_path", "broken", "--num_generations", "2", "--eta", "0", "--optim", "adamw_8bit"),
            *("--reward_funcs", "doctor_rewards:fails", "doctor_rewards:darkness", "doctor_rewards:nowhere"),
            *("--resume_from_checkpoint", "true"),
        )
        assert report.status == 1
        bitsandbytes = [] if importlib.util.find_spec("bitsandbytes") else ["bitsandbytes"]
        expected = ["HeunDiscreteScheduler", "dropout", "doctor_rewards:nowhere", "A rollout needs 8 prompts",
                    "no whole checkpoint in 'run'", *bitsandbytes, "of which 0 can be trained",
                    "Reward 'fails' raised KeyError: 'no such thing' on 8 images"]  # fmt: skip
        assert len(report.refused) == len(expected)
        for part, refused in zip(expected, report.refused, strict=True):
            assert part in refused
        assert report.cells("darkness")[0] != "-" and report.cells("fails")[-2] == "raised"
        assert report.out.count("not trained: deterministic") == 3

    def test_a_file_for_several_processes_is_read_as_one_of_them_does(self, doctor):
        report = doctor(config="several.yaml")
        assert report.status == 0 and not report.refused

    def test_how_many_processes_is_not_its_business(self, doctor):
        report = doctor("--num_processes", "2")
        assert report.status == 2 and "--num_processes is for slas-trl train alone" in report.err

    def test_a_ratio_that_is_not_1(self, doctor, home, monkeypatch):
        """The denoiser drops something, and no module tells of it."""
        monkeypatch.syspath_prepend(home)
        importlib.import_module("random_unet")  # diffusers asks for it
        report = doctor("--model_name_or_path", "random")
        assert report.status == 1
        (refused,) = report.refused
        deviation = report["max |ratio - 1|"].split()[0]
        assert float(deviation) > 1e-5
        assert "Before any update the ratio of step" in refused and f"it is off by {deviation} " in refused

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--reward_funcs", "doctor_rewards:never"], "No image got a score: never returned only None or NaN"),
            (["--reward_weights", "1", "2"], "reward_weights has 2 entries for 1 rewards"),
            (["--lora_target_modules", "nothing"], "Target modules {'nothing'} not found"),
            (["--dataset_name", "nowhere.txt"], "no prompt file 'nowhere.txt'"),
            (["--eval_strategy", "steps", "--eval_steps", "1"], "--eval_dataset_name"),
            ([*FLUX[:3], '{"max_sequence_length": 8, "taste": 1}'], "FluxPipeline takes no taste; it takes prompt"),
            (["--resume_from_checkpoint", "run/checkpoint-2"], "no checkpoint folder"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else None,
    )
    def test_of_one_kind(self, doctor, options, expected):
        report = doctor(*options)
        assert report.status == 1
        (refused,) = report.refused
        assert expected in refused
        assert report["denoiser"] and report["scheduler"]

    def test_no_reward(self, doctor):
        report = doctor(config="no_reward.yaml")
        assert report.status == 1
        (refused,) = report.refused
        assert refused.startswith("No reward is named: rewards not checked. Give --reward_funcs")
        assert report["max |ratio - 1|"].startswith("0 ") and "\nrewards" not in report.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model_name_or_path", "."], "holds no diffusers pipeline: there is no model_index.json in it"),
        (["--model_name_or_path", "nobody/no-such-model"], "nobody/no-such-model"),
        (["--gama", "1"], "Did you mean --gamma?"),
        (["--num_generations", "3"], "(3)"),
        (["--model_init_kwargs", '{"dtype": "half"}'], "dtype must be one of float32"),
    ],
)
def test_bad_input_gets_one_message(doctor, monkeypatch, options, expected):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    report = doctor(*options)
    assert (report.status, report.out) == (2, "")
    assert "slas-trl doctor: error: " in report.err and expected in report.err

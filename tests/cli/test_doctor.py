"""`slas-trl doctor`, the whole command: what it reports, and that it ends with the first problem."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from diffusers import HeunDiscreteScheduler, UNet2DConditionModel

from slas_trl import slas_advantages
from slas_trl.advantages import effective_share
from slas_trl.cli.main import main
from tests.cli.tiny_run import SMALL, make_home
from tests.tiny_pipelines import flux_pipeline, sd_pipeline


REWARDS = """
scores = []  # of all calls of `darkness`

def darkness(prompts, images, **columns):
    new = [1 - sum(image.convert("L").tobytes()) / (255 * image.width * image.height) for image in images]
    scores.extend(new)
    return new

def constant(prompts, images, **columns):
    return [0.5] * len(images)

def sometimes(prompts, images, **columns):
    return [None if i % 4 == 0 else float(i) for i in range(len(images))]

def never(prompts, images, **columns):
    return [None] * len(images)

def fails(prompts, images, **columns):
    raise KeyError("no such thing")
"""
SETTINGS = {"use_peft": True, "lora_r": 4, "per_device_train_batch_size": 4, "steps_per_generation": 2}
FLUX = ["--model_name_or_path", "flux", "--pipeline_kwargs", '{"max_sequence_length": 8}']


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's folder: models, prompts, rewards and YAML files."""
    folder = make_home(tmp_path_factory.mktemp("home"), "doctor_rewards", REWARDS, **SETTINGS)
    flux_pipeline().save_pretrained(folder / "flux")
    pipe = sd_pipeline()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder / "heun")
    (folder / "several.yaml").write_text((folder / "run.yaml").read_text() + "generation_batch_size: 64\n")
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

    def cells(self, reward: str) -> list[str]:
        """A line of the table of rewards: mean, std, no score, seconds, weight."""
        line = next(line for line in self.out.splitlines() if f"| {reward} " in line)
        return [cell.strip() for cell in line.split("|")[2:-1]]

    @property
    def problem(self) -> str:
        return " ".join(self.out.partition("Training cannot start:\n- ")[2].split())


@pytest.fixture
def doctor(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Report]:
    """Runs `slas-trl doctor --config run.yaml` with further options, and looks whether it left anything behind."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def files() -> dict[Path, float]:
        return {path: path.stat().st_mtime for path in home.rglob("*") if "__pycache__" not in str(path)}

    def run(*options: str, config: str = "run.yaml") -> Report:
        before, status = files(), main(["doctor", "--config", config, *options])
        report = Report(status, *capsys.readouterr())
        assert "Traceback" not in report.err and files() == before  # the output_dir not made, nor a model touched
        return report

    return run


def test_a_training_that_can_start(doctor):
    getattr(sys.modules.get("doctor_rewards"), "scores", []).clear()
    report = doctor()
    assert report.status == 0 and report.out.endswith("\nTraining can start.\n") and not report.problem
    unet = UNet2DConditionModel.from_pretrained("model/unet")
    total = sum(p.numel() for p in unet.parameters())
    assert report["denoiser"] == f"unet: UNet2DConditionModel, {total:,} parameters, float32"
    # Rank 4 on the four projections of every attention
    adapter = sum(4 * sum(module.weight.shape) for name, module in unet.named_modules()
                  if name.endswith(("to_q", "to_k", "to_v", "to_out.0")))  # fmt: skip
    assert report["trained"] == f"adapter: {adapter:,} parameters, float32"
    assert report["scheduler"] == "DDIMScheduler -> DDIMSDEScheduler, prediction_type epsilon, eta 1.0"
    assert report["images"].startswith("16 x 16 pixels") and report["denoiser calls"] == "1 per step"
    assert report["steps"].startswith("3, of which 2 stochastic and 2 trained")
    assert report["max |ratio - 1|"].startswith("0 before the update")
    scores = sys.modules["doctor_rewards"].scores
    mean, std, missing, _, weight = report.cells("darkness")
    assert len(scores) == 8 and (float(mean), float(std)) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-2)
    assert (missing, weight) == ("0%", "1")
    share = effective_share(slas_advantages(scores, 4, gamma=0.5))
    assert f"gamma 0.5, |A| up to {slas_advantages(scores, 4).abs().max():.3g}" in report["advantages"]
    assert f"effective share {share:.3f}" in report["advantages"] and "to sample 8 images" in report["time"]


def test_a_flow_with_all_weights_a_window_and_a_reference(doctor):
    window = ["--sde_window_size", "2", "--sde_window_start", "0", "--timestep_fraction", "0.5"]
    options = ["--use_peft", "false", "--beta", "0.1", "--bf16", "true", "--eval_strategy", "steps"]
    report = doctor(*FLUX, *window, *options, "--eval_dataset_name", "shapes", "--eval_reward_funcs",
                    "doctor_rewards:sometimes", "--reward_funcs", "doctor_rewards:darkness", "doctor_rewards:constant",
                    "--reward_weights", "2", "0")  # fmt: skip
    assert report.status == 0
    assert "-> FlowSDEScheduler, noise_schedule flow_grpo" in report["scheduler"]
    assert report["trained"].startswith("all weights: ") and report["trained"].endswith("autocast to bf16")
    assert report["steps"].startswith("3, of which 2 stochastic and 1 trained")
    assert report["KL to reference"].startswith("0 nats")
    assert (report.cells("darkness")[-1], report.cells("constant")[-1]) == ("2", "0")
    assert (report.cells("sometimes")[2], report.cells("sometimes")[-1]) == ("25%", "held out")


def test_the_embedded_pipeline_and_a_file_for_several_processes(doctor):
    report = doctor("--reward_funcs", "doctor_rewards:constant", config="several.yaml")
    assert report.status == 0 and "groups without a difference 100%" in report["advantages"]
    assert main(["doctor", *SMALL, "--use_cpu", "true"]) == 0


def test_it_goes_on_from_a_checkpoint(doctor, tmp_path):
    folder = tmp_path / "trained"
    options = ["--output_dir", str(folder), "--report_prompts", "0"]
    assert main(["train", "--config", "run.yaml", *options, "--max_steps", "1", "--save_steps", "1"]) == 0
    files = sorted(folder.rglob("*"))
    assert doctor(*options, "--resume_from_checkpoint", "true").status == 0
    assert sorted(folder.rglob("*")) == files


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model_name_or_path", "heun"], "HeunDiscreteScheduler"),
        (["--reward_funcs", "doctor_rewards:never"], "never"),
        (["--reward_funcs", "doctor_rewards:fails"], "no such thing"),
        (["--dataset_name", "nowhere.txt"], "nowhere.txt"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "--eval_dataset_name"),
        (["--resume_from_checkpoint", "true"], "no whole checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_first_problem_is_reported(doctor, options, expected):
    report = doctor(*options)
    assert report.status == 1 and expected in report.problem and report["denoiser"]


def test_bad_input_gets_one_message(doctor):
    report = doctor("--model_name_or_path", ".")
    assert (report.status, report.out) == (2, "") and "model_index.json" in report.err

"""The configurations in `examples/cli_configs`: what they amount to, and that every value says where it comes from."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, PipelineQuantizationConfig
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch.testing._internal.distributed.fake_pg import FakeStore

from slas_trl.rewards.resolve import resolve_reward, reward_name
from slas_trl.scripts.arguments import SHAPES_SETTINGS, LoraArguments, SLASScriptArguments, parse
from slas_trl.trainer import SLASConfig
from slas_trl.trainer.sampling import window_of
from tests.tiny_pipelines import PIPELINES
from tests.trainer.tiny_trainers import tiny_trainer


FOLDER = Path(__file__).parents[2] / "examples" / "cli_configs"
DOCUMENTATION = FOLDER.parents[1] / "docs" / "source" / "paper_reproduction.md"
FILES = sorted(FOLDER.glob("*.yaml"))
# 8 in the others
PROCESSES = {"flux_paper": 16, "flux_dancegrpo": 16, "flux_lora_24gb": 1, "shapes": 1, "shapes_comparison": 1}
SOURCES = {"paper", "DanceGRPO", "Flow-GRPO", "ours"}
ENVIRON = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

# By hand, from the tables of DanceGRPO's and Flow-GRPO's settings in docs/source/paper_reproduction.md.
AMOUNTS = {  # images per rollout, groups, updates per rollout, images per update, timesteps trained
    "sd14_paper": (512, 32, 2, 256, 49),
    "sd14_dancegrpo": (512, 32, 2, 256, 49),
    "flux_paper": (192, 16, 3, 64, 9),
    "flux_dancegrpo": (192, 16, 3, 64, 9),
    "sd35_flowgrpo": (1152, 48, 2, 576, 9),
    "qwen_image_lora": (512, 32, 2, 256, 2),
    "flux_lora_24gb": (48, 4, 1, 48, 5),
    "shapes": (192, 12, 1, 192, 4),
    "shapes_comparison": (96, 12, 1, 96, 4),
}


@contextmanager
def processes(number: int) -> Iterator[None]:
    """As the first of so many: torch's process group whose other members do not exist."""
    if number == 1:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRON:
            patch.setenv(name, "0" if name.endswith("RANK") else str(number))
        dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def load(name: str, *argv: str) -> tuple[SLASScriptArguments, LoraArguments, SLASConfig]:
    """Parse a preset, on the CPU."""
    rewards = [] if "reward_funcs" in read(name) else ["--reward_funcs", "shapes_verifier"]  # a comparison's are given
    return parse(["--config", str(FOLDER / f"{name}.yaml"), "--use_cpu", *rewards, *argv])


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Whatever these tests are started by."""
    for name in ENVIRON:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", AMOUNTS)
def test_amounts(name):
    number = PROCESSES.get(name, 8)
    with processes(number):
        config = load(name)[2]
        images = config.images_per_rollout * number
        updates = config.micro_steps_per_rollout / config.micro_steps_per_update
        assert config.generation_batch_size == images
    amounts = (images, images / config.num_generations, updates, images / updates, config.num_trained_timesteps)
    assert amounts == AMOUNTS[name] and {path.stem for path in FILES} == set(AMOUNTS)
    rewards = read(name).get("reward_funcs", [])
    assert [reward_name(resolve_reward(reward)) for reward in rewards] == [reward.split(":")[0] for reward in rewards]


@pytest.mark.parametrize("name", ["sd14_paper", "flux_paper", "sd35_flowgrpo", "qwen_image_lora"])
def test_another_number_of_processes_is_an_error_or_the_same_experiment(name):
    with processes(4):
        with pytest.raises(ValueError, match="generation_batch_size.*steps_per_generation"):
            load(name)
        # What the file's head says.
        text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        found = re.search(r"--steps_per_generation (\d+)/P --gradient_accumulation_steps (\d+)/P", text)
        assert found
        chunks, accumulated = (str(int(number) // 4) for number in found.groups())
        config = load(name, "--steps_per_generation", chunks, "--gradient_accumulation_steps", accumulated)[2]
        images, _, updates, _, _ = AMOUNTS[name]
        assert config.images_per_rollout * 4 == images
        assert config.micro_steps_per_rollout / config.micro_steps_per_update == updates


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_says_where_it_comes_from(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        source = re.search(r"  # \[([\w-]+)\]", line)
        assert len(line) <= 119 and (not line.strip(" ") or line.lstrip()[0] == "#" or source and source[1] in SOURCES)


def sources(name: str) -> dict[str, str]:
    """Where the value of each field comes from, by its line's comment."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    found = [re.match(r"(\w+):.*  # \[([\w-]+)\]", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def test_the_documentation_has_every_value():
    text = DOCUMENTATION.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|", text, re.MULTILINE)
    for column, name in ((1, "sd14_paper"), (2, "flux_paper")):
        documented = {row[0]: row[column] for row in rows if row[column] != "–"}
        settings = read(name)
        assert documented.keys() == settings.keys()
        for field, value in settings.items():
            if "..." not in documented[field]:
                assert yaml.safe_load(documented[field]) == value, field
    sd14, flux = sources("sd14_paper"), sources("flux_paper")
    for field, _, _, source in rows:
        assert source == ", ".join(dict.fromkeys(of[field] for of in (sd14, flux) if field in of)), field


@pytest.mark.parametrize("model", ["sd14", "flux"])
def test_the_baseline_differs_in_the_advantage_alone(model):
    with processes(PROCESSES.get(f"{model}_paper", 8)):
        slas, baseline = load(f"{model}_paper"), load(f"{model}_dancegrpo")
    differ = {
        field.name
        for ours, theirs in zip(slas, baseline, strict=True)
        for field in fields(ours)
        if field.init and getattr(ours, field.name) != getattr(theirs, field.name)
    }
    assert differ == {"scale_rewards", "gamma", "output_dir"}
    assert (slas[2].scale_rewards, slas[2].gamma) == ("batch", 0.5)
    assert (baseline[2].scale_rewards, baseline[2].gamma) == ("group", 0.0)


@pytest.mark.parametrize(("name", "weights"), [("sd14_paper", [1.0, 1.0]), ("flux_paper", [0.7, 1.4])])
def test_the_papers_rewards(name, weights):
    settings = read(name)
    assert settings["reward_weights"] == weights
    human, clip = map(resolve_reward, settings["reward_funcs"])
    assert (human.__name__, human.version) == ("hpsv2", "v2.1")
    assert (clip.__name__, clip.model) == ("clip_score", "apple/DFN5B-CLIP-ViT-H-14-378")


def test_flux_sigmas_have_a_shift_of_three():
    """FLUX's own shift depends on the size of the image; the preset's list makes it DanceGRPO's, 3."""
    settings = read("flux_paper")
    sigmas, steps = settings["pipeline_kwargs"]["sigmas"], settings["num_inference_steps"]
    tokens = (settings["height"] // 16) * (settings["width"] // 16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # FLUX.1-dev's
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    linear = np.linspace(1, 1 / steps, steps)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(list(3 * linear / (1 + 2 * linear)), abs=1e-5)


def test_flow_grpos_kl_weight_is_converted():
    """Its KL leaves out the step's length, which therefore goes into β."""
    settings = read("sd35_flowgrpo")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)  # SD 3.5's
    scheduler.set_timesteps(settings["num_inference_steps"])
    length = -scheduler.sigmas.diff()[:-1].mean().item()
    assert settings["beta"] == pytest.approx(0.01 * length, rel=0.02)
    assert settings["ema_decay"] == pytest.approx(math.pow(0.9, 1 / 8), abs=5e-4)


def test_24_gb_are_quantized_as_diffusers_understands():
    given = read("flux_lora_24gb")["model_init_kwargs"]["quantization_config"]
    config = PipelineQuantizationConfig(**given)
    assert config.components_to_quantize == ["transformer", "text_encoder_2"]
    assert config._resolve_quant_config(is_diffusers=True, module_name="vae") is None


def test_shapes_is_what_training_does_without_arguments():
    assert read("shapes") == SHAPES_SETTINGS


FAMILIES = {"sd14": "sd", "flux": "flux", "sd35": "sd3", "qwen": "sd3", "shapes": "sd3"}  # of the same schedulers


@pytest.mark.parametrize("name", [name for name in AMOUNTS if "dancegrpo" not in name and "comparison" not in name])
def test_no_noise_that_is_not_trained_is_left_on_the_pictures(tmp_path, name):
    """The last transition of the first rollout, by a trainer with all of the preset's settings of sampling."""
    with processes(PROCESSES.get(name, 8)):
        config = load(name)[2]
    family = FAMILIES[name.split("_")[0]]
    sampling = ("num_inference_steps", "noise_schedule", "noise_level", "eta", "train_final_step")
    window = ("sde_window_size", "sde_window_start", "timestep_fraction")
    call = dict(PIPELINES[family][1])
    own = {key: call.pop(key) for key in ("height", "width", "guidance_scale")}
    call |= {} if "qwen" in name else config.pipeline_kwargs or {}
    own |= {key: getattr(config, key) for key in (*sampling, *window)}
    trainer = tiny_trainer(tmp_path, family, max_steps=1, **own, pipeline_kwargs=call)
    trainer.replayer.scheduler.window = window_of(trainer.args, 0, np.random.default_rng(0))
    [batch, *_] = trainer.batches([0] * trainer.args.num_generations, 0)
    rollout = trainer.replayer.sample(**batch.call)
    assert rollout.steps[-1].std == 0 and len(rollout.steps) == config.num_inference_steps
    assert all(rollout.steps[step].std > 0 for step in rollout.trainable_steps)

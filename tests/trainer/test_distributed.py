"""Two processes do what one does with the same images, as DDP and as FSDP2, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from tests.tiny_pipelines import PIPELINES

from .tiny_trainers import PROMPTS, close, logged, same
from .two_processes import going_on_from_an_adapter, one_of_the_zoo, one_update_for_each_rollout


pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
ROUNDED = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("both")


@pytest.fixture(scope="module")
def found(folder, server):
    """What each of two processes found, first as DDP and then as FSDP2."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, "-m", "tests.trainer.two_processes", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", **server.environ},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return [torch.load(folder / f"result_{rank}.pt") for rank in (0, 1)]


@pytest.fixture
def two(found):
    return [each["ddp"] for each in found]


@pytest.fixture
def sharded(found):
    return [each["fsdp"] for each in found]


def test_the_result_is_that_of_one_process(two, tmp_path):
    """Groups that span both processes are one group."""
    alone, both = one_update_for_each_rollout(tmp_path, 1, num_generations=8), [found["compared"] for found in two]
    images, advantages = (torch.cat([found[key][:8] for found in both]) for key in ("images", "advantages"))
    assert len(images.flatten(1).unique(dim=0)) == 16
    torch.testing.assert_close(images, alone["images"][:16], **ROUNDED)
    torch.testing.assert_close(advantages, alone["advantages"][:16], rtol=1e-5, atol=1e-5)
    assert advantages.abs().max() > 0.5
    assert same(both[0]["weights"], both[1]["weights"]) and both[0]["evaluated"] == both[1]["evaluated"]
    close(both[0]["weights"], alone["weights"], **ROUNDED)
    assert both[0]["moved"] == pytest.approx(alone["moved"], rel=1e-3) and alone["moved"] > 1e-3
    assert both[0]["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5)


def test_components_and_held_out_rewards_are_those_of_all_images(two):
    for found in two:
        line = found["components"]
        assert line["rewards/reward/rank/mean"] == 0.5
        assert line["held_out"] == pytest.approx(sum(map(len, PROMPTS["prompt"][:3])) / 3)
        assert "Reward 'uneven' returned the components" in line["uneven"] and "second" in line["uneven"]


def test_each_keeps_its_part_of_the_rollout_and_one_writes_the_rest(two, folder):
    run = folder / "ddp" / "components"
    assert {path.name for path in (run / "checkpoint-1").iterdir()} == {
        *("pytorch_lora_weights.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"),
        *("model_card.json", "slas_state.json", "rng_state_0.pth", "rng_state_1.pth", "rollout_0.pt", "rollout_1.pt"),
    }
    PIPELINES["sd3"][0]().load_lora_weights(run)
    assert [line["step"] for line in logged(run)] == [1]
    [line] = map(json.loads, (run / "calibration.jsonl").read_text().splitlines())
    assert line["step"] == 1 and len(line["group_std"]) == 4  # eight images each
    assert (run / "calibration.png").is_file()


@pytest.mark.parametrize("name", ["wan2.2", "sd3.5-slg"])
def test_denoisers_that_are_called_in_parts_get_the_gradients_of_both_processes(two, name, tmp_path):
    assert same(two[0][name], two[1][name])
    close(two[0][name], one_of_the_zoo(name, tmp_path, 1), **ROUNDED)


def test_both_skip_an_update_that_one_cannot_make(two):
    """And leave out the prompt that does not divide: two epochs are two updates."""
    assert two[0]["skipped"] == two[1]["skipped"] == [1.0, 0.0]


def test_a_reward_that_raises_on_one_process_ends_both(found, folder):
    one, other = (each["failing"] for each in found)
    assert one["updates"] == other["updates"] == 1
    assert all("'moody' raised RuntimeError: out of paint" in error for error in (one["error"], other["error"]))
    assert one["error"].startswith("On process 1 of 2")
    assert (folder / "failing" / "checkpoint-1" / "pytorch_lora_weights.safetensors").is_file()


def test_sharded_weights_are_those_of_one_process(sharded, tmp_path):
    alone = one_update_for_each_rollout(tmp_path, 1, full=True, beta=0.1, use_ema=True)
    for found in sharded:
        assert found["full"]["shards"] > 10
        close(found["full"]["weights"], alone["weights"], **ROUNDED)
        assert found["full"]["moved"] == pytest.approx(alone["moved"], rel=1e-3)
        assert found["full"]["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5)
    assert alone["shards"] == 0 and alone["moved"] > 1e-3 and alone["evaluated"][0] != alone["evaluated"][1]


def test_sharded_and_in_mixed_precision(sharded, tmp_path):
    """The ratio is 1 and the KL 0 before an update; timesteps and latents are not narrowed: all is nearly as alone."""
    alone = one_update_for_each_rollout(tmp_path, 1, full=True, bf16=True, beta=0.1)
    for found in (found["bf16"] for found in sharded):
        assert [log["ratio/max_deviation"] for log in found["logs"]] == [0.0] * 2
        assert found["logs"][0]["kl"] == 0.0 and found["logs"][1]["kl"] > 0.0
        assert found["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-3)
        for ours, theirs in zip(found["logs"], alone["logs"], strict=True):
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)


def test_what_a_sharded_run_saves_is_plain(sharded, folder):
    checkpoint = folder / "fsdp" / "gamma" / "run" / "checkpoint-4"
    assert SD3Transformer2DModel.load_config(checkpoint / "transformer")["_class_name"] == "SD3Transformer2DModel"
    model = SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    # No second copy of the weights, which for a large base model would be most of the checkpoint.
    assert not list(checkpoint.glob("pytorch_model*"))
    pipe = PIPELINES["flux"][0]()
    pipe.load_lora_weights(folder / "fsdp" / "continued")
    config = pipe.transformer.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (4, 8)


def test_a_sharded_run_goes_on_from_an_adapter_as_one_process_does(sharded, tmp_path):
    alone = going_on_from_an_adapter(tmp_path, 1)
    for found in (found["continued"] for found in sharded):
        close(found["weights"], alone["weights"], **ROUNDED)
        assert found["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5) and found["shards"] > 10
        assert [log["ratio/max_deviation"] for log in found["logs"]] == [0.0] * 2
        kl = [log["kl"] for log in found["logs"]]
        assert kl[0] == 0.0 and kl[1] == pytest.approx(alone["logs"][1]["kl"], rel=1e-3)


def test_one_pushes_what_both_have_trained(two, server):
    results = [found["pushed"] for found in two]
    assert [found["returned"] for found in results] == [True, False]
    assert all("push_to_hub cannot push to" in found["refused"] for found in results)
    titles = [commit["title"] for commit in server.commits(results[0]["repo"])]
    assert titles[-3:] == ["Model save", "Training in progress, checkpoint 1", "initial commit"]
    pictures = {"samples/1_before.png", "samples/1_after.png"}
    files = server.files(results[0]["repo"]).keys()
    assert {"pytorch_lora_weights.safetensors", *pictures, "last-checkpoint/trainer_state.json"} <= files


def test_both_processes_choose_the_same_gamma_and_resume_within_a_rollout(two, sharded):
    """And FSDP2, whose parameters are sharded, measures what DDP does."""
    ddp, fsdp = ([each["gamma"] for each in found] for found in (two, sharded))
    for one, other in (ddp, fsdp):
        gammas, of_resumed = one["gammas"]
        assert other["gammas"] == [gammas, of_resumed] and gammas == of_resumed and len(set(gammas)) == 2
        assert same(*one["weights"]) and same(*other["weights"]) and same(one["weights"][0], other["weights"][0])
    assert fsdp[0]["lambda_max"] == pytest.approx(ddp[0]["lambda_max"], rel=1e-3)
    assert fsdp[0]["gammas"][0] == pytest.approx(ddp[0]["gammas"][0], rel=1e-3)

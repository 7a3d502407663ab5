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
from tests.trainer.tiny_trainers import logged, same
from tests.trainer.two_processes import going_on_from_an_adapter, one_of_the_zoo, one_update_for_each_rollout


pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def launch(what: str, folder: Path, **environment: str) -> list[dict]:
    """What each of two processes found."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, "-m", "tests.trainer.two_processes", what, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return [torch.load(folder / f"result_{rank}.pt") for rank in (0, 1)]


def assert_close(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


# DDP


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def two(folder, server):
    return launch("ddp", folder, **server.environ)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds that does all of it."""
    return one_update_for_each_rollout(tmp_path_factory.mktemp("one-process"), 1)


def of_the_first_rollout(found, key, processes):
    return found["compared"][key][: 16 // processes] if processes > 1 else found[key][:16]


def test_each_samples_its_share_of_the_images(one, two):
    images = torch.cat([of_the_first_rollout(found, "images", 2) for found in two])
    assert len(images.flatten(1).unique(dim=0)) == 16
    torch.testing.assert_close(images, of_the_first_rollout(one, "images", 1), rtol=1e-5, atol=1e-6)


def test_components_and_held_out_rewards_are_those_of_all_images(two):
    for found in two:
        line = found["components"]
        assert line["rewards/reward/rank/mean"] == 0.5 and line["held_out"] == pytest.approx(1.0)
        assert "Reward 'uneven' returned the components" in line["uneven"] and "second" in line["uneven"]


def test_the_advantages_are_those_of_one_process(one, two):
    advantages = torch.cat([of_the_first_rollout(found, "advantages", 2) for found in two])
    torch.testing.assert_close(advantages, of_the_first_rollout(one, "advantages", 1), rtol=1e-5, atol=1e-5)
    assert advantages.abs().max() > 0.5


def test_both_have_the_same_weights_afterwards(two):
    assert same(two[0]["compared"]["weights"], two[1]["compared"]["weights"])
    assert same(two[0]["resumed"]["whole"], two[1]["resumed"]["whole"])


def test_the_weights_are_those_of_one_process(one, two):
    assert_close(two[0]["compared"]["weights"], one["weights"])
    assert two[0]["compared"]["moved"] == pytest.approx(one["moved"], rel=1e-3) and one["moved"] > 1e-3


def test_the_evaluation_is_that_of_one_process(one, two):
    assert two[0]["compared"]["evaluated"] == two[1]["compared"]["evaluated"]
    assert two[0]["compared"]["evaluated"] == pytest.approx(one["evaluated"], rel=1e-5)


def test_groups_may_span_processes(two, tmp_path):
    alone = one_update_for_each_rollout(tmp_path, 1, num_generations=8, max_steps=2)
    assert_close(two[0]["spanning"]["weights"], alone["weights"])
    advantages = torch.cat([found["spanning"]["advantages"][:8] for found in two])
    torch.testing.assert_close(advantages, alone["advantages"][:16], rtol=1e-5, atol=1e-5)


def test_resuming_within_a_rollout(two):
    for found in two:
        assert same(found["resumed"]["whole"], found["resumed"]["from-1"])
        assert same(found["resumed"]["whole"], found["resumed"]["from-3"])


def test_each_keeps_its_part_of_the_rollout_and_one_the_weights(two, folder):
    checkpoint = folder / "adapter" / "checkpoint-1"
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {
        *("pytorch_lora_weights.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"),
        *("slas_state.json", "rng_state_0.pth", "rng_state_1.pth", "rollout_0.pt", "rollout_1.pt"),
    }
    PIPELINES["sd3"][0]().load_lora_weights(folder / "adapter")
    assert [line["step"] for line in logged(folder / "adapter")] == [1]


def test_one_records_the_groups_of_both(two, folder):
    [line] = map(json.loads, (folder / "adapter" / "calibration.jsonl").read_text().splitlines())
    assert line["step"] == 1 and len(line["group_std"]) == 4  # eight images each
    assert (folder / "adapter" / "calibration.png").is_file()


@pytest.mark.parametrize("name", ["wan2.2", "sd3.5-slg"])
def test_denoisers_that_are_called_in_parts_get_the_gradients_of_both_processes(two, name, tmp_path):
    assert same(two[0][name], two[1][name])
    assert_close(two[0][name], one_of_the_zoo(name, tmp_path, 1))


def test_both_skip_an_update_that_one_cannot_make(two):
    assert two[0]["skipped"] == two[1]["skipped"] == [1.0, 0.0]


def test_prompts_that_do_not_divide_are_left_out_by_both(two):
    # Five prompts, four groups to a rollout: one rollout an epoch.
    assert two[0]["uneven"] == two[1]["uneven"] == 2


# FSDP2


@pytest.fixture(scope="module")
def fsdp_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def sharded(fsdp_folder, server):
    return launch("fsdp", fsdp_folder, **FSDP2, **server.environ)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sharded_weights_are_those_of_one_process(sharded, kind, tmp_path):
    alone = one_update_for_each_rollout(tmp_path, 1, full=kind == "full", beta=0.1, use_ema=True)
    for found in sharded:
        assert found[kind]["sharded"] and found[kind]["shards"] > 10
        assert_close(found[kind]["weights"], alone["weights"])
        assert found[kind]["moved"] == pytest.approx(alone["moved"], rel=1e-3)
        assert found[kind]["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5)
    assert alone["shards"] == 0 and alone["moved"] > 1e-3 and alone["evaluated"][0] != alone["evaluated"][1]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sharded_and_in_mixed_precision(sharded, kind, tmp_path):
    """The ratio is 1 and the KL 0 before an update; timesteps and latents are not narrowed: all is nearly as alone."""
    alone = one_update_for_each_rollout(tmp_path, 1, full=kind == "full", bf16=True, beta=0.1)
    for found in sharded:
        logs = found[f"{kind} bf16"]["logs"]
        assert [log["ratio/max_deviation"] for log in logs] == [0.0] * 3
        assert logs[0]["kl"] == 0.0 and logs[2]["kl"] > 0.0
        assert found[f"{kind} bf16"]["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-3)
        for ours, theirs in zip(logs, alone["logs"], strict=True):
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)


@pytest.mark.parametrize(("kind", "at"), [("lora", 1), ("full", 3)])
def test_sharded_runs_resume_within_a_rollout(sharded, kind, at):
    for found in sharded:
        resumed = found[f"{kind} resumed"]
        assert same(resumed["whole"], resumed[f"from-{at}"])


def test_what_a_sharded_run_saves_is_plain(sharded, fsdp_folder):
    checkpoint = fsdp_folder / "full-resumed" / "whole" / "checkpoint-4"
    assert SD3Transformer2DModel.load_config(checkpoint / "transformer")["_class_name"] == "SD3Transformer2DModel"
    model = SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    pipe = PIPELINES["sd3"][0]()
    pipe.load_lora_weights(fsdp_folder / "lora-resumed" / "whole" / "checkpoint-4")
    config = pipe.transformer.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (4, 8)
    # No second copy of the weights, which for a large base model would be most of the checkpoint.
    assert not list(checkpoint.glob("pytorch_model*"))


# Both ways


@pytest.mark.parametrize("way", ["two", "sharded"])
def test_one_pushes_what_both_have_trained(way, server, request):
    results = [found["pushed"] for found in request.getfixturevalue(way)]
    assert [found["returned"] for found in results] == [True, False]
    assert [found["looks"] for found in results] == [3, 3]
    assert all("push_to_hub cannot push to" in found["refused"] for found in results)
    titles = [commit["title"] for commit in server.commits(results[0]["repo"])]
    assert titles == ["Model save", "Training in progress, checkpoint 1", "initial commit"]  # nothing new afterwards
    files = server.files(results[0]["repo"])
    weights = "transformer/config.json" if way == "sharded" else "pytorch_lora_weights.safetensors"
    pictures = {"samples/1_before.png", "samples/1_after.png"}
    assert {weights, *pictures, "last-checkpoint/trainer_state.json"} <= files.keys()


def test_going_on_from_an_adapter_is_as_with_one_process(two, sharded, tmp_path):
    alone = going_on_from_an_adapter(tmp_path, 1)
    for found in (*two, *sharded):
        assert_close(found["continued"]["weights"], alone["weights"])
        logs = found["continued"]["logs"]
        assert [log["ratio/max_deviation"] for log in logs] == [0.0] * 3
        assert logs[0]["kl"] == 0.0 and logs[2]["kl"] == pytest.approx(alone["logs"][2]["kl"], rel=1e-3)
    assert not two[0]["continued"]["sharded"] and sharded[0]["continued"]["sharded"]


def test_both_processes_choose_the_same_gamma(two, sharded):
    """And FSDP2, whose parameters are sharded, measures what DDP does."""
    for one, other in ([each["gamma"] for each in found] for found in (two, sharded)):
        assert one["gammas"] == other["gammas"] and len(set(one["gammas"])) == len(one["gammas"]) == 3
        assert same(one["weights"], other["weights"])
        assert all(torch.equal(a, b) for a, b in zip(one["vector"], other["vector"], strict=True))
        for each in (one, other):
            assert same(each["weights"], each["resumed"]) and each["resumed gammas"] == each["gammas"]
    ddp, fsdp = two[0]["gamma"], sharded[0]["gamma"]
    assert fsdp["sharded"] and not ddp["sharded"]
    assert fsdp["lambda_max"] == pytest.approx(ddp["lambda_max"], rel=1e-3)
    assert fsdp["gammas"] == pytest.approx(ddp["gammas"], rel=1e-3)
    # λ_max is that of both processes' samples.
    assert ddp["lambda_max"][0] == pytest.approx(ddp["dense"], rel=0.1)
    assert ddp["dense"] not in [pytest.approx(found["gamma"]["alone"], rel=1e-3) for found in two]


def test_a_reward_that_raises_on_one_process_ends_both(two, sharded, folder, fsdp_folder):
    for found, run in ((two, folder / "failing"), (sharded, fsdp_folder / "failing")):
        one, other = (each["failing"] for each in found)
        assert one["updates"] == other["updates"] == 1
        assert "Reward 'moody' raised RuntimeError: out of paint" in other["error"]
        assert one["error"].startswith(
            "On process 1 of 2: Reward 'moody' raised RuntimeError: out of paint on 4 images"
        )
        assert (run / "checkpoint-1" / "pytorch_lora_weights.safetensors").is_file()

"""Two processes do what one does with the same images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_pipelines import PIPELINES
from tests.trainer.tiny_trainers import logged, same
from tests.trainer.two_processes import one_update_for_each_rollout


pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("two-processes")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*launch, "-m", "tests.trainer.two_processes", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """What each of the two found."""
    return [torch.load(folder / f"result_{rank}.pt") for rank in (0, 1)]


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


def test_the_advantages_are_those_of_one_process(one, two):
    advantages = torch.cat([of_the_first_rollout(found, "advantages", 2) for found in two])
    torch.testing.assert_close(advantages, of_the_first_rollout(one, "advantages", 1), rtol=1e-5, atol=1e-5)
    assert advantages.abs().max() > 0.5


def test_both_have_the_same_weights_afterwards(two):
    assert same(two[0]["compared"]["weights"], two[1]["compared"]["weights"])
    assert same(two[0]["resumed"]["whole"], two[1]["resumed"]["whole"])


def test_the_weights_are_those_of_one_process(one, two):
    for name, weights in two[0]["compared"]["weights"].items():
        torch.testing.assert_close(weights, one["weights"][name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_evaluation_is_that_of_one_process(one, two):
    assert two[0]["compared"]["evaluated"] == two[1]["compared"]["evaluated"]
    assert two[0]["compared"]["evaluated"] == pytest.approx(one["evaluated"], rel=1e-5)


def test_resuming_within_a_rollout(two):
    for found in two:
        assert same(found["resumed"]["whole"], found["resumed"]["from-1"])
        assert same(found["resumed"]["whole"], found["resumed"]["from-3"])


def test_each_keeps_its_part_of_the_rollout_and_one_the_weights(folder):
    checkpoint = folder / "adapter" / "checkpoint-1"
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {
        *("pytorch_lora_weights.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"),
        *("slas_state.json", "rng_state_0.pth", "rng_state_1.pth", "rollout_0.pt", "rollout_1.pt"),
    }
    PIPELINES["sd3"][0]().load_lora_weights(folder / "adapter")
    assert [line["step"] for line in logged(folder / "adapter")] == [1]

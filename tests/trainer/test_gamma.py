"""Schedules of γ in a training run: what they choose, what they measure, and how they go on."""

import math
import signal

import pytest
import torch

from slas_trl.objective import gaussian_kl
from slas_trl.trust_region import kl_feedback, largest_gamma
from tests.tiny_policies import dense_fisher

from .tiny_trainers import (
    Watched,
    alike,
    column,
    logged,
    lora,
    resumed,
    same,
    tiny_trainer,
    trained,
    trained_weights,
    untimed,
)


SGD = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "learning_rate": 0.5}
FISHER = [f"trust_region/{name}" for name in ("lambda_max", "tau", "g_max", "budget", "moment", "gamma_bound")]


def test_the_effective_share(tmp_path):
    trained(tmp_path, gamma_schedule="ess", min_effective_share=0.45, gamma_max=2.0, max_steps=3)
    shares, gammas = column(tmp_path, "advantages/effective_share"), column(tmp_path, "gamma")
    assert len(set(gammas)) == 3 and all(0 < gamma <= 2 for gamma in gammas)
    for share, gamma in zip(shares, gammas, strict=True):
        assert share == pytest.approx(0.45, abs=1e-6) or (share > 0.45 and gamma == 2.0)


def test_the_kl(tmp_path):
    settings = {"kl_threshold": 3e-8, "gradient_accumulation_steps": 3, "max_steps": 6}
    trainer = trained(tmp_path, gamma_schedule="kl", **settings)
    kls, gammas = column(tmp_path, "trust_region/kl"), column(tmp_path, "gamma")
    assert len(kls) == 6 and len(gammas) == 3 and gammas[0] == 0.5
    for i, last in ((1, kls[:2]), (2, kls[1:4])):  # of the last three updates, as there are three timesteps
        assert gammas[i] == pytest.approx(kl_feedback(gammas[i - 1], sum(last) / len(last), 3e-8, 1.0))
    assert len(set(gammas)) == 3
    assert sorted(step for step, _ in trainer.gamma.state.kls) == [0, 1, 2]


def test_the_measured_kl_is_that_between_before_and_after(tmp_path):
    trainer = tiny_trainer(tmp_path, cls=Watched, gamma_schedule="kl", max_steps=1)
    before = trained_weights(trainer)
    trainer.train()
    inputs = trainer.micro_steps[0]
    means = []
    for weights in (trained_weights(trainer), before):
        for name, parameter in trainer.model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])
        output = trainer.replayer.replay(inputs["rollout"], inputs["step"])
        means.append(output.mean.detach())
    assert column(tmp_path, "trust_region/kl") == [gaussian_kl(*means, output.std).mean().item()] != [0.0]


def test_the_trust_region(tmp_path):
    """The γ of each rollout is the largest within its budget, which follows from the updates before."""
    settings = {"gamma_schedule": "trust_region", "fisher_update_steps": 2, "kl_threshold": 1.6e-3, "gamma_max": 3.0}
    kept = []

    class Kept(Watched):
        def _log_rollout(self, scores, result, *rest):
            kept.append(result.scaled)
            super()._log_rollout(scores, result, *rest)

    trained(tmp_path, cls=Kept, full=True, max_steps=4, **settings, **SGD)
    lines = logged(tmp_path)
    first, second, *_ = lines
    assert first["gamma"] == 0.5 and "trust_region/budget" not in first
    # In plain ascent τ is the learning rate, and g follows from the gradient.
    assert second["trust_region/tau"] == pytest.approx(0.5, rel=1e-3)
    assert second["trust_region/g_max"] == pytest.approx(first["grad_norm"] ** 2 / first["trust_region/moment"])
    bound = first["trust_region/lambda_max"] * (0.5 * first["grad_norm"]) ** 2 / 2
    assert first["trust_region/kl_bound"] == pytest.approx(bound, rel=2e-3)
    assert 0 < first["trust_region/kl"] < first["trust_region/kl_bound"]
    for line, x in zip(lines[1:], kept[1:], strict=True):
        assert all(math.isfinite(line[name]) for name in FISHER)
        assert line["gamma"] == line["trust_region/gamma_bound"]
        assert line["gamma"] == pytest.approx(largest_gamma(x, line["trust_region/budget"], 3.0), abs=1e-6)
        assert line["trust_region/moment"] <= line["trust_region/budget"] or line["gamma"] == 0
        assert line["trust_region/gamma_bound_bounded"] <= line["gamma"] + 1e-6
        assert line["trust_region/gamma_bound_sub_gaussian"] <= line["gamma"] + 1e-6
        budget = 2 * 1.6e-3 / (line["trust_region/tau"] ** 2 * line["trust_region/lambda_max"])
        assert line["trust_region/budget"] == pytest.approx(budget / line["trust_region/g_max"])
    assert len({line["gamma"] for line in lines}) > 2
    # λ_max is measured every other update, and the KL of these updates beside it.
    eigenvalues = [line["trust_region/lambda_max"] for line in lines]
    assert eigenvalues[0] == eigenvalues[1] != eigenvalues[2] == eigenvalues[3]
    assert ["trust_region/kl" in line for line in lines] == [True, False, True, False]


@pytest.mark.parametrize("schedule", ["trust_region", "kl"])
def test_a_rollout_without_any_difference(tmp_path, schedule):
    def same_for_all(prompts, images, **columns):
        return [0.5] * len(images)

    trained(tmp_path, reward_funcs=same_for_all, gamma_schedule=schedule, gamma=0.3, max_steps=2)
    assert len(column(tmp_path, "gamma")) == 2 and column(tmp_path, "gamma")[0] == 0.3
    assert all(math.isfinite(value) for line in logged(tmp_path) for value in line.values())


@pytest.mark.parametrize(
    ("family", "settings"),
    [("sd3", {"gradient_accumulation_steps": 3}), ("flux", {"gradient_checkpointing": True})],
)
def test_lambda_max_is_that_of_the_dense_fisher_matrix(tmp_path, family, settings):
    adapter = lora(r=1, target_modules=["to_q", "to_v"])
    settings |= {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2}
    trainer = trained(tmp_path, family, cls=Watched, peft_config=adapter, fisher_update_steps=1, **settings)
    outputs = [trainer.replayer.replay(trainer.rollouts[0], step) for step in (0, 2)]  # of 0, 1, 2
    fisher = dense_fisher(outputs, [p for p in trainer.model.parameters() if p.requires_grad])
    eigenvalue = torch.linalg.eigvalsh(fisher)[-1].item()
    found = column(tmp_path, "trust_region/lambda_max")[0]
    assert 0.85 * eigenvalue < found < 1.01 * eigenvalue


def test_measuring_changes_nothing(tmp_path):
    """Weights, moving average, and whatever draws from the global generator."""
    runs, settings = [], {"full": True, "gradient_accumulation_steps": 3, "beta": 0.1}
    for fisher_update_steps in (None, 1):
        folder = tmp_path / str(fisher_update_steps)
        trainer = trained(folder, use_ema=True, max_steps=3, fisher_update_steps=fisher_update_steps, **settings)
        average = [parameter.clone() for parameter in trainer.trained.average.model.shadow_params]
        lines = [{k: v for k, v in line.items() if "trust" not in k} for line in untimed(folder)]
        runs.append((trained_weights(trainer), torch.get_rng_state(), average, lines))
    (weights, state, average, lines), others = runs
    assert same(weights, others[0]) and torch.equal(state, others[1]) and lines == others[3]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(average, others[2], strict=True))
    assert len(column(folder, "trust_region/lambda_max")) > 0


def test_a_skipped_update_is_not_measured(tmp_path):
    trainer = tiny_trainer(tmp_path, gamma_schedule="kl", fisher_update_steps=1, max_steps=3)
    sample = trainer.replayer.sample

    def poisoned(**call):
        rollout = sample(**call)
        if trainer.state.global_step == 1:
            rollout.log_probs[0] = math.nan
        return rollout

    trainer.replayer.sample = poisoned
    trainer.train()
    lines = logged(tmp_path)
    assert [line["update_skipped"] for line in lines] == [0.0, 1.0, 0.0]
    assert ["trust_region/kl" in line for line in lines] == [True, False, True]
    assert len(trainer.gamma.state.updates) == 2
    assert all(math.isfinite(line["trust_region/lambda_max"]) for line in lines)


SCHEDULES = {
    "trust region": {"gamma_schedule": "trust_region", "fisher_update_steps": 2, "kl_threshold": 1e-6,
                     "gradient_accumulation_steps": 3},
    "kl": {"gamma_schedule": "kl", "kl_threshold": 3e-8, "gradient_accumulation_steps": 3, "use_ema": True},
    "measured": {"fisher_update_steps": 3, "gradient_accumulation_steps": 2},
}  # fmt: skip


class Interrupted(Watched):
    """After γ was chosen: the update under way starts over, and so does the choice."""

    def compute_loss(self, *args, **kwargs):
        self.was_interrupted = signal.SIGINT if self.state.global_step == 2 else 0
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    settings = {"max_steps": 4, **SCHEDULES[name]}
    whole = trained(tmp_path / "whole", **settings, save_strategy="steps", save_steps=1)
    assert len(set(column(tmp_path / "whole", "gamma"))) > 1 or name == "measured"
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "interrupted", cls=Interrupted, **settings)
    for folder, checkpoint in (
        *((f"from-{at}", tmp_path / "whole" / f"checkpoint-{at}") for at in (1, 3)),
        ("interrupted", True),
    ):
        assert alike(resumed(tmp_path / folder, checkpoint, **settings), whole)


def test_a_run_may_go_on_with_another_schedule(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "gamma": 0.4}
    trained(tmp_path / "kl", gamma_schedule="kl", **saved)
    trained(tmp_path / "constant", **saved)
    assert (tmp_path / "kl" / "checkpoint-2" / "gamma.pt").is_file()
    assert not (tmp_path / "constant" / "checkpoint-2" / "gamma.pt").exists()
    for before, after in (("kl", "trust_region"), ("constant", "trust_region")):
        folder = tmp_path / f"{before}-{after}"
        resumed(folder, tmp_path / before / "checkpoint-2", gamma_schedule=after, max_steps=3, gamma=0.4)
        assert column(folder, "gamma")[-1] == 0.4

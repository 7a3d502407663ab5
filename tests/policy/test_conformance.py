"""Every family of the zoo, through the same checks and without a line of code for any of them."""

from pathlib import Path

import pytest
import torch

from slas_trl.policy.checks import denoisers_of

from .zoo.all import FAMILIES
from .zoo.checks import PROMPTS, attention_weights, free_frozen_components, identities, largest_error, sampled


PAGE = Path(__file__).parents[2] / "docs" / "source" / "pipelines.md"
families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_every_trainable_step_has_exactly_the_recorded_log_prob_and_a_gradient(name):
    family = FAMILIES[name]
    replayer, rollout = sampled(family)
    assert len(rollout) == len(rollout.images) == 2 and len(rollout.trainable_steps) >= 2
    assert rollout.call["prompt"] == (PROMPTS[0] if family.one_prompt else PROMPTS)
    before = identities(replayer.pipe)
    for step in rollout.trainable_steps:
        log_prob = replayer.replay(rollout, step).log_prob
        assert log_prob.isfinite().all() and torch.equal(log_prob, rollout.log_probs[:, step])
        log_prob.sum().backward()
    assert identities(replayer.pipe) == before  # also after calls that ended in the middle

    for denoiser in denoisers_of(replayer.pipe).values():
        weights = attention_weights(denoiser)
        reached = {key: weight.grad for key, weight in weights.items() if weight.grad is not None}
        assert all(gradient.isfinite().all() for gradient in reached.values())
        # All but those of the last block that look after the text alone, which nothing reads any more.
        unreached = [key for key in weights if key not in reached or not reached[key].any()]
        assert len(weights) >= 4 and len(unreached) <= len(weights) / 4, unreached

    freed = free_frozen_components(replayer)
    assert "vae" in freed and any("text_encoder" in component for component in freed)
    assert largest_error(replayer, rollout) == 0.0


@families
def test_the_pipeline_is_left_as_it_was_and_listens_to_its_prompts(name):
    family = FAMILIES[name]
    replayer, rollout = sampled(family, output_type="latent")
    before, scheduler = identities(replayer.pipe), replayer.pipe.scheduler
    other = replayer.sample(**family.arguments(PROMPTS[::-1], output_type="latent"))
    assert identities(replayer.pipe) == before and replayer.pipe.scheduler is scheduler is not replayer.scheduler
    assert torch.equal(other.steps[0].sample, rollout.steps[0].sample)
    changed = (other.steps[-1].prev_sample - rollout.steps[-1].prev_sample).flatten(1).abs().max(1).values
    assert (changed > 0).all()


def test_the_documentation_has_a_row_for_each_family():
    """Written by `python -m benchmarks.support_table`, between two comments."""
    _, _, *table = PAGE.read_text("utf-8").split("support table: ")[1].strip().splitlines()[1:-1]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert [row[0] for row in rows] == [family.title for family in FAMILIES.values()]
    assert {row[6] for row in rows} == {"0.0"}
    assert [row[3] for row in rows] == [family.task for family in FAMILIES.values()]
    assert all((row[7] == "yes") == (row[3] == "text-to-image") for row in rows)

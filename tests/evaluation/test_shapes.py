import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from examples.shapes_pictures import draw, misdescribe
from slas_trl import evaluation
from slas_trl.evaluation.shapes import ShapesReport, compare, evaluate_shapes, paired_difference
from slas_trl.shapes import load_shapes_pipeline, world


class Draughtsman:
    """Has the call of a pipeline, and draws by the rules of the world; a share of the pictures is wrong."""

    def __init__(self, wrong: float = 0.0):
        self.wrong, self.calls = wrong, []

    def __call__(self, prompt, generator, **call):
        self.calls.append((len(prompt), call))
        images = []
        for text, source in zip(prompt, generator, strict=True):
            rng = np.random.default_rng(source.initial_seed())
            caption = world.parse_caption(text)
            if rng.random() < self.wrong:
                caption = misdescribe(caption, rng)
            images.append(Image.fromarray((draw([caption], rng)[0] * 255).round().astype(np.uint8)))
        return SimpleNamespace(images=images)


def report(**scores: list[list[float]]) -> ShapesReport:
    prompts = ("a circle", "a square", "two circles", "three circles")
    return ShapesReport(prompts, {name: np.array(values, dtype=float) for name, values in scores.items()}, seed=0)


def same(values: list[list[float]]) -> ShapesReport:
    return report(graded=values, lenient=values, strict=values)


def test_a_perfect_pipeline():
    perfect = Draughtsman()
    result = evaluate_shapes(perfect, images_per_prompt=1, batch_size=50, num_inference_steps=7)
    assert result.prompts == tuple(caption.text for caption in world.captions_of("test"))
    assert list(result.estimates) == [*world.CATEGORIES, "overall"]
    for by_score in result.estimates.values():
        for estimate in by_score.values():
            assert (estimate.mean, estimate.se, estimate.low, estimate.high) == (1, 0, 1, 1)
    full, rest = divmod(len(result.prompts), 50)
    assert perfect.calls == [(size, {"num_inference_steps": 7}) for size in [50] * full + [rest] * bool(rest)]


def test_each_image_has_its_own_seed():
    def graded(images_per_prompt: int = 8, **options: int) -> np.ndarray:
        prompts = ["a circle", "three crosses", "a red square"]
        return evaluate_shapes(Draughtsman(wrong=0.5), prompts, images_per_prompt, **options).scores["graded"]

    many = graded()
    assert many.shape == (3, 8) and 0 < (many == 1).mean() < 1
    np.testing.assert_array_equal(graded(batch_size=5), many)
    np.testing.assert_array_equal(graded(3), many[:, :3])
    assert (graded(seed=1) != many).any()


def test_estimates_are_means_of_prompts_and_of_categories():
    # Means of the prompts: .5 and 1 (single_object), 0 and .5 (counting).
    estimates = same([[1, 0], [1, 1], [0, 0], [0, 1]]).estimates
    assert list(estimates) == ["single_object", "counting", "overall"]
    single, overall = estimates["single_object"]["strict"], estimates["overall"]["strict"]
    assert (single.mean, single.prompts, overall.mean, overall.prompts) == (0.75, 2, 0.5, 4)
    assert (single.se, overall.se) == pytest.approx((0.25, math.sqrt(2 * 0.25**2) / 2))
    # More images of a prompt are no more prompts.
    assert same([[1], [0], [1], [0]]).estimates == same([[1] * 9, [0] * 9, [1] * 9, [0] * 9]).estimates


def test_paired_difference():
    before = report(graded=[[0.2, 0.2], [0.8, 0.8], [0.1, 0.1], [0.5, 0.5]], lenient=[[0, 0]] * 4, strict=[[0, 0]] * 4)
    after = report(graded=[[0.3, 0.3], [0.9, 0.9], [0.1, 0.1], [0.7, 0.7]], lenient=[[0, 1]] * 4, strict=[[0, 0]] * 4)
    estimates = paired_difference(before, after).estimates
    single, counting = estimates["single_object"]["graded"], estimates["counting"]["graded"]
    assert (single.mean, single.se) == pytest.approx((0.1, 0))  # both gained as much, however different they are
    assert before.estimates["single_object"]["graded"].se == pytest.approx(0.3)
    assert (counting.mean, counting.se) == pytest.approx((0.1, 0.1))
    overall = estimates["overall"]
    assert (overall["graded"].mean, overall["graded"].se) == pytest.approx((0.1, 0.05))
    assert (overall["lenient"].mean, overall["strict"].mean) == (0.5, 0)
    assert paired_difference(after, before).estimates["overall"]["graded"].mean == pytest.approx(-0.1)


def test_only_like_can_be_paired():
    one = same([[1], [0], [1], [0]])
    others = {
        "images_per_prompt": same([[1, 1], [0, 0], [1, 1], [0, 0]]),
        "seed": replace(one, seed=1),
        "prompts": replace(one, prompts=one.prompts[::-1]),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=name):
            paired_difference(one, other)


def test_tables():
    before, after = same([[1, 0], [1, 1], [0, 0], [0, 1]]), same([[1, 1], [1, 1], [1, 0], [0, 1]])
    lines = before.table().splitlines()
    assert lines[0] == "| category      | prompts | graded        | lenient       | strict        |"
    assert lines[2] == "| single_object | 2       | 0.750 ± 3.177 | 0.750 ± 3.177 | 0.750 ± 3.177 |"
    assert "| +0.250 ± " in paired_difference(before, after).table()
    overall = compare(before, after).splitlines()[-1]
    assert re.fullmatch(r"\| overall       \| 0.500 ± (.{5}) \(0.500 ± \1\) \| 0.750 .* \| \+0.250 .*\) \|", overall)


def test_reports_are_written_and_read():
    result = evaluate_shapes(Draughtsman(wrong=0.5), ["a circle", "a square", "two circles"], images_per_prompt=2)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["estimates"]["overall"]["graded"]["prompts"] == 3
    assert written["estimates"]["single_object"]["strict"]["mean"] == result.scores["strict"][:2].mean()
    again = ShapesReport.from_dict(written)
    assert (again.prompts, again.seed, again.images_per_prompt) == (result.prompts, 0, 2)
    np.testing.assert_array_equal(again.scores["graded"], result.scores["graded"])
    difference = paired_difference(result, again).to_dict()["estimates"]["overall"]["graded"]
    assert difference["mean"] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompts": ["a dog"]}, "a dog"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a circle", "a circle"]}, "images_per_prompt"),
        ({"images_per_prompt": 0}, "images_per_prompt=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"output_type": "pt"}, "output_type"),
    ],
)
def test_errors_come_before_sampling(arguments, named):
    untouched = Draughtsman()
    with pytest.raises(ValueError, match=named):
        evaluate_shapes(untouched, **arguments)
    assert not untouched.calls


def test_the_embedded_pipeline():
    pipe = load_shapes_pipeline()
    prompts = ["a red circle", "a blue square", "two circles", "three crosses"]
    first, again = (evaluation.evaluate_shapes(pipe, prompts, 2, num_inference_steps=4) for _ in range(2))
    assert pipe.num_timesteps == 4
    np.testing.assert_array_equal(first.scores["graded"], again.scores["graded"])

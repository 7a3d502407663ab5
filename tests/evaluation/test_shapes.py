import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats

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
    prompts = ["a circle", "three crosses", "a red square"]
    many = evaluate_shapes(Draughtsman(wrong=0.5), prompts, images_per_prompt=8)
    assert many.scores["strict"].shape == (3, 8)
    assert 0 < many.scores["strict"].mean() < 1
    small_batches = evaluate_shapes(Draughtsman(wrong=0.5), prompts, images_per_prompt=8, batch_size=5)
    np.testing.assert_array_equal(small_batches.scores["graded"], many.scores["graded"])
    few = evaluate_shapes(Draughtsman(wrong=0.5), prompts, images_per_prompt=3)
    np.testing.assert_array_equal(few.scores["graded"], many.scores["graded"][:, :3])
    other_seed = evaluate_shapes(Draughtsman(wrong=0.5), prompts, images_per_prompt=8, seed=1)
    assert (other_seed.scores["graded"] != many.scores["graded"]).any()


def test_standard_errors_are_those_of_prompts():
    # Means of the prompts: .5 and 1 (single_object), 0 and .5 (counting).
    estimates = same([[1, 0], [1, 1], [0, 0], [0, 1]]).estimates
    assert list(estimates) == ["single_object", "counting", "overall"]
    single, overall = estimates["single_object"]["strict"], estimates["overall"]["strict"]
    assert (single.mean, single.prompts) == (0.75, 2)
    assert single.se == pytest.approx(0.25)  # .3536 / sqrt(2)
    assert single.high - single.mean == pytest.approx(0.25 * stats.t.ppf(0.975, 1))
    assert (overall.mean, overall.prompts) == (0.5, 4)
    assert overall.se == pytest.approx(math.sqrt(2 * 0.25**2) / 2)
    assert overall.mean - overall.low == pytest.approx(overall.se * stats.t.ppf(0.975, 2))


def test_more_images_of_a_prompt_are_no_more_prompts():
    once, often = same([[1], [0], [1], [0]]), same([[1] * 9, [0] * 9, [1] * 9, [0] * 9])
    assert once.estimates == often.estimates


def test_overall_counts_categories_equally():
    prompts = ("a circle", "a square", "a cross", "two circles")
    values = np.array([[1.0], [1.0], [1.0], [0.0]])
    result = ShapesReport(prompts, {"graded": values, "lenient": values, "strict": values}, seed=0)
    assert result.estimates["overall"]["graded"].mean == 0.5
    # A single prompt says nothing of how much prompts differ.
    assert math.isnan(result.estimates["counting"]["graded"].se)
    assert math.isnan(result.estimates["overall"]["graded"].se)
    assert result.to_dict()["estimates"]["overall"]["graded"]["se"] is None


def test_intervals_cover():
    # Prompts of very different difficulty, from a beta distribution with mean .3; 95% of the intervals should have it.
    rng = np.random.default_rng(0)
    prompts = tuple(caption.text for caption in world.captions_of("test"))
    hits = 0
    for _ in range(400):
        values = rng.binomial(1, rng.beta(0.6, 1.4, size=(len(prompts), 1)), size=(len(prompts), 4)).astype(float)
        overall = ShapesReport(prompts, {"strict": values}, seed=0).estimates["overall"]["strict"]
        hits += overall.low <= 0.3 <= overall.high
    assert 0.92 <= hits / 400 <= 0.98


def test_paired_difference():
    before = report(graded=[[0.2, 0.2], [0.8, 0.8], [0.1, 0.1], [0.5, 0.5]], lenient=[[0, 0]] * 4, strict=[[0, 0]] * 4)
    after = report(graded=[[0.3, 0.3], [0.9, 0.9], [0.1, 0.1], [0.7, 0.7]], lenient=[[0, 1]] * 4, strict=[[0, 0]] * 4)
    estimates = paired_difference(before, after).estimates
    single, counting = estimates["single_object"]["graded"], estimates["counting"]["graded"]
    assert single.mean == pytest.approx(0.1)
    assert single.se == pytest.approx(0, abs=1e-12)  # both prompts gained as much, however different they are
    assert before.estimates["single_object"]["graded"].se == pytest.approx(0.3)
    assert counting.mean == pytest.approx(0.1)
    assert counting.se == pytest.approx(0.1)
    assert estimates["overall"]["graded"].mean == pytest.approx(0.1)
    assert estimates["overall"]["graded"].se == pytest.approx(0.05)
    assert estimates["overall"]["lenient"].mean == 0.5
    assert estimates["overall"]["strict"].mean == 0
    assert paired_difference(after, before).estimates["overall"]["graded"].mean == pytest.approx(-0.1)


def test_only_like_can_be_paired():
    one = same([[1], [0], [1], [0]])
    with pytest.raises(ValueError, match="images_per_prompt.*1 and 2"):
        paired_difference(one, same([[1, 1], [0, 0], [1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="seed.*0 and 1"):
        paired_difference(one, ShapesReport(one.prompts, one.scores, seed=1))
    with pytest.raises(ValueError, match="equal prompts"):
        paired_difference(one, ShapesReport(one.prompts[::-1], one.scores, seed=0))


def test_tables():
    before, after = same([[1, 0], [1, 1], [0, 0], [0, 1]]), same([[1, 1], [1, 1], [1, 0], [0, 1]])
    lines = before.table().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "category",
        "prompts",
        "graded",
        "lenient",
        "strict",
    ]
    assert lines[2].startswith("| single_object | 2       | 0.750 ± 3.177 |")
    assert lines[-1].startswith("| overall       | 4       | 0.500 ± ")
    assert len({len(line) for line in lines}) == 1
    assert "+0.250 ± " in paired_difference(before, after).table()
    last = [cell.strip() for cell in compare(before, after).splitlines()[-1].split("|")[1:-1]]
    assert last[0] == "overall"
    assert [cell[:6].strip() for cell in last[1:]] == ["0.500", "0.750", "+0.250"]
    assert all(cell.endswith(")") for cell in last[1:])


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
    ("arguments", "message"),
    [
        ({"prompts": ["a dog"]}, "not a prompt of the shapes world"),
        ({"prompts": []}, "Expected prompts"),
        ({"prompts": ["a circle", "a circle"]}, "2 with 1 different"),
        ({"images_per_prompt": 0}, "images_per_prompt=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"output_type": "pt"}, "output_type"),
        ({"generator": None}, "generator"),
    ],
)
def test_errors_come_before_sampling(arguments, message):
    untouched = Draughtsman()
    with pytest.raises(ValueError, match=message):
        evaluate_shapes(untouched, **arguments)
    assert not untouched.calls


def test_the_embedded_pipeline():
    pipe = load_shapes_pipeline()
    prompts = ["a red circle", "a blue square", "two circles", "three crosses"]
    before = evaluate_shapes(pipe, prompts, images_per_prompt=2, num_inference_steps=4)
    assert pipe.num_timesteps == 4
    again = evaluate_shapes(pipe, prompts, images_per_prompt=2, num_inference_steps=4)
    np.testing.assert_array_equal(before.scores["graded"], again.scores["graded"])
    assert evaluation.evaluate_shapes is evaluate_shapes

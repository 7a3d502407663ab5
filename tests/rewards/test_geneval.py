"""GenEval's rules on given detections: which ones count, of which color, on which side, and what a share is worth."""

import json

import pytest

from slas_trl.rewards.geneval import Detection, judge, read_specification, relations


def at(label: str, x: float = 50, y: float = 50, score: float = 0.95, size: float = 10) -> Detection:
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def no_colors(group):
    raise AssertionError("no color was asked for")


def judged(row: dict, *detections: Detection, colors=no_colors) -> tuple[float, bool]:
    share, right = judge(read_specification(row), detections, colors)
    return pytest.approx(share), right


DOG = {"include": [{"class": "dog", "count": 1}], "tag": "single_object"}
TWO = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}], "tag": "two_object"}
CLOCKS = {"include": [{"class": "clock", "count": 3}], "exclude": [{"class": "clock", "count": 4}], "tag": "counting"}
RED_DOG = {"include": [{"class": "dog", "count": 1, "color": "red"}], "tag": "colors"}
LEFT_CAT = {"class": "cat", "count": 1, "position": ["left of", 0]}
LEFT = {"include": [{"class": "dog", "count": 1}, LEFT_CAT], "tag": "position"}


def test_confident_objects_are_counted():
    assert judged(DOG, at("dog", score=0.31)) == (1, True)
    assert judged(DOG, at("dog", score=0.3)) == (0, False)
    # Where numbers are asked for, GenEval counts sure detections only.
    assert judged(CLOCKS, *[at("clock", score=0.91)] * 3, at("clock", score=0.9)) == (1, True)
    assert judge(read_specification(DOG), [at("dog", score=0.31)], no_colors, threshold=0.5) == (0, False)
    shares = [judged(CLOCKS, *[at("clock")] * n) for n in range(8)]
    assert shares == [(s, n == 3) for n, s in enumerate([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, 0])]


def test_more_than_asked_for_is_right_for_geneval_and_not_for_the_share():
    assert judged(DOG, at("dog"), at("cat")) == (1, True)
    assert judged(DOG, at("cat")) == judged(DOG) == (0, False)
    assert judged(TWO, at("dog")) == (0.5, False)
    # GenEval asks for "at least", which a policy learns to exploit; Flow-GRPO's grading is exact.
    assert judged(DOG, at("dog"), at("dog")) == (0, True)
    assert judged(TWO, at("dog"), at("cat"), at("cat"), at("cat")) == (0.5, True)

    crowd = {"include": [{"class": "dog", "count": 16}], "exclude": [{"class": "dog", "count": 17}]}
    assert judged(crowd, *[at("dog")] * 40) == (1, True)  # more than 16 of a class are not looked at


def test_excluded_objects():
    row = {"include": [{"class": "dog"}], "exclude": [{"class": "cat", "count": 2}], "tag": "no_cats"}
    assert judged(row, at("dog")) == (1, True)
    assert judged(row, at("dog"), at("cat")) == (1, True)
    assert judged(row, at("dog"), at("cat"), at("cat")) == (0.5, False)
    nothing = {"exclude": [{"class": "cat", "count": 1}]}
    assert judged(nothing) == (1, True)
    assert judged(nothing, at("cat")) == (0, False)


def test_colors():
    assert judged(RED_DOG, at("dog"), colors=lambda group: ["red"]) == (1, True)
    assert judged(RED_DOG, at("dog"), colors=lambda group: ["blue"]) == (0.5, False)
    assert judged(RED_DOG, at("cat")) == (0, False)  # nothing to look at: no color is asked for
    two = {"include": [{"class": "dog", "count": 2, "color": "red"}], "tag": "colors"}
    assert judged(two, at("dog"), at("dog"), colors=lambda group: ["red", "blue"]) == (0.75, False)
    assert judged(two, at("dog")) == (0.25, False)
    # Those of the most confident objects count.
    unsure, sure = at("dog", score=0.5), at("dog", score=0.8)
    assert judged(RED_DOG, unsure, sure, colors=lambda group: ["red" if one is sure else "blue" for one in group])[1]


@pytest.mark.parametrize(
    ("x", "y", "seen"),
    [
        *((20, 50, {"left of"}), (80, 50, {"right of"}), (50, 20, {"above"}), (50, 80, {"below"})),
        *((20, 20, {"left of", "above"}), (80, 80, {"right of", "below"}), (50, 50, set())),
        (51.9, 50, set()),  # a tenth of both sizes is 2 pixels
        (52.1, 50, set()),  # beyond it, but not by half of the offset
        (54.1, 50, {"right of"}),
        (80, 59, {"right of"}),
    ],
)
def test_relations(x, y, seen):
    assert relations(at("cat", x, y).box, at("dog", 50, 50).box) == seen


def test_position():
    assert judged(LEFT, at("dog", 50), at("cat", 20)) == (1, True)
    assert judged(LEFT, at("dog", 50), at("cat", 80)) == (2 / 3, False)
    assert judged(LEFT, at("dog", 50)) == (1 / 3, False)
    assert judged(LEFT, at("cat", 20)) == (1 / 3, False)  # of what?
    # The most confident ones must be so, whoever else is.
    cats = at("cat", 20, score=0.5), at("cat", 80, score=0.9)
    assert judged(LEFT, at("dog", 50), *cats) == (1 / 3, False)
    assert judged(LEFT, at("dog", 50), at("cat", 20, score=0.9), at("cat", 80, score=0.5))[1]


def test_position_of_several_is_that_of_all():
    row = {"include": [{"class": "dog", "count": 2}, {"class": "cat", "count": 2, "position": ["above", 0]}]}
    dogs = at("dog", 40, 80), at("dog", 60, 80)
    assert judged(row, *dogs, at("cat", 40, 20), at("cat", 60, 20)) == (1, True)
    assert judged(row, *dogs, at("cat", 40, 20), at("cat", 60, 80)) == (2 / 3, False)
    # Nothing is left of what is wrong itself.
    row = {"include": [*RED_DOG["include"], LEFT_CAT]}
    scene = at("dog", 50), at("cat", 20)
    assert judged(row, *scene, colors=lambda group: ["red"]) == (1, True)
    assert judged(row, *scene, colors=lambda group: ["blue"]) == (0.5, False)


@pytest.mark.parametrize(
    ("asked", "label"),
    [("computer mouse", "mouse"), ("tv", "tvmonitor"), ("teddy bear", "Teddy_Bear"), ("cell phone", "Mobile phone")],
)
def test_classes_go_by_several_names(asked, label):
    assert judged({"include": [{"class": asked, "count": 1}]}, at(label)) == (1, True)


def test_rows_as_tables_give_them():
    entry = {"class": "dog", "count": None, "color": None, "position": None, "another": None}
    plain = read_specification({"include": [{"class": "dog"}]})
    assert read_specification({"include": [entry], "exclude": None, "tag": None}) == plain
    assert read_specification(json.dumps(LEFT)) == read_specification(LEFT)
    text = {"include": [{"class": "dog"}, {"class": "cat", "position": ["left of", "0"]}]}
    assert read_specification(text) == read_specification({**LEFT, "tag": None})
    for nothing in (None, "", {}, {"include": None}, {"include": [], "exclude": []}):
        assert read_specification(nothing) is None
    # Without the tag, what is excluded tells that numbers are asked for.
    assert read_specification({**CLOCKS, "tag": None}).counting
    assert not read_specification({**CLOCKS, "tag": "other"}).counting


@pytest.mark.parametrize(
    "entry",
    [
        *("dog", {"clas": "dog"}, {"class": "dog", "colour": "red"}, {"class": "dog", "color": "turquoise"}),
        *({"class": "dog", "count": count} for count in (0, 1.5)),
        *({"class": "dog", "position": position} for position in (["beside", 0], ["left of", 1])),
    ],
)
def test_what_cannot_be_checked_is_refused(entry):
    no_color = {"include": [{"class": "dog"}], "exclude": [{"class": "cat", "color": "black"}]}  # for what is excluded
    for row in ({"include": [{"class": "cat"}, entry]}, no_color):
        with pytest.raises(ValueError, match="(class|color|count|position)"):
            read_specification(row)

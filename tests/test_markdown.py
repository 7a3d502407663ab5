"""What other people wrote, in YAML and Python; in Markdown, see test_model_card.py, where pages are made of it."""

import math

import pytest
import yaml

from slas_trl.markdown import as_python, one_line, shown, to_yaml


NUMBERS = ["1.5", "0x1f", "1_000", "12", ".5", "-3", "yes", "null", "~", "2026-01-01", "1:20", ""]
TEXTS = [
    "---\nlicense: mit\n---",
    "a: b # c",
    "\"quoted\" and 'quoted'",
    "tab\there",
    "  spaces around  ",
    "- {x: [1, 2]} &a *a !b | > %",
    "emoji \N{ROCKET}, \N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}, 日本, שלום",
    "many words " * 1000,
]
UNSHOWABLE = ["\x00\x1b[31m\x7f", "a\N{RIGHT-TO-LEFT OVERRIDE}b", "\ud83d"]


@pytest.mark.parametrize("text", [*NUMBERS, *TEXTS])
def test_yaml_gives_back_what_went_in(text):
    data = {"license_name": text, "tags": [text, 1e-4, 3], "widget": [{"text": text}]}
    written = to_yaml(data)
    assert yaml.safe_load(written) == data
    assert "\n---" not in written  # where readers take it for the end


@pytest.mark.parametrize("text", NUMBERS)
def test_texts_that_look_like_numbers_are_quoted(text):
    assert to_yaml({"name": text}) == f"name: '{text}'\n"


@pytest.mark.parametrize("text", [*NUMBERS, *TEXTS, *UNSHOWABLE, "\\n"])
def test_python_gives_back_what_went_in(text):
    written = as_python({"prompt": text, "more": [text, 1, 2.5, None, True]})
    assert eval(written) == {"prompt": text, "more": [text, 1, 2.5, None, True]}
    assert written.isprintable()


def test_python_of_numbers_that_have_no_literal():
    assert math.isnan(eval(as_python(math.nan))) and eval(as_python([-math.inf])) == [-math.inf]


def test_what_no_page_can_show_is_marked():
    assert shown("a\x00b\ud83dc\N{RIGHT-TO-LEFT OVERRIDE}d\r\ne\u2028f") == "a\ufffdb\ufffdc\ufffdd\ne\nf"
    assert one_line(" a\n\tb ") == "a b"

"""What other people wrote, in Python; in Markdown and YAML, see test_card.py, where pages are made of it."""

import pytest

from slas_trl.publishing.escaping import Markdown, as_code, as_python, as_text, one_line, shown


TEXTS = [
    *("1.5", "yes", "", "\\n", "tab\there", "\"quoted\" and 'quoted'", "emoji \N{ROCKET}, 日本, שלום"),
    *("\x00\x1b[31m\x7f", "a\N{RIGHT-TO-LEFT OVERRIDE}b", "\ud83d", "---\nlicense: mit\n---"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_python_gives_back_what_went_in(text):
    written = as_python({"prompt": text, "more": [text, 1, 2.5, None, True]})
    assert eval(written) == {"prompt": text, "more": [text, 1, 2.5, None, True]}
    assert written.isprintable()


def test_what_no_page_can_show_is_marked():
    assert shown("a\x00b\ud83dc\N{RIGHT-TO-LEFT OVERRIDE}d\r\ne\u2028f") == "a\ufffdb\ufffdc\ufffdd\ne\nf"
    assert one_line(" a\n\tb ") == "a b"


def test_markdown():
    assert as_text("a *b* | snake_case") == "a &#42;b&#42; &#124; snake_case"
    assert as_text(Markdown("*b*")) == "*b*" and as_text(0.5) == "0.5"
    assert as_code("a_b") == "`a_b`" and as_code("`") == "<code>&#96;</code>"

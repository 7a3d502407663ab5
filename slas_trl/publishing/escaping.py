"""Text that somebody else wrote, in Markdown and Python, reads as it was written, and does nothing else."""

import re
from typing import Any


# Control characters, overrides of the direction of writing, and halves of characters: no page can show them.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
# What begins something in Markdown, HTML or formulas, and what makes a link of an address; underscores within words do
# not. At the start of a line more does.
_ACTIVE = re.compile(r"[&<>*`~|\\$#@\[\]{}]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_STARTING = re.compile(r"^([^\w&]|\d(?=\d*[.)]))")
_PLAIN_CODE = re.compile(r"[\w.,:;/=+()% -]+", re.ASCII)


class Markdown(str):
    """Text that is Markdown already, which is not escaped."""


def shown(text: str) -> str:
    """The text without what no page can show; a mark is in its place. Lines stay lines."""
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", re.sub("\r\n|[\r\u2028\u2029]", "\n", text))


def one_line(text: str) -> str:
    """[`shown`], on one line."""
    return " ".join(shown(text).split())


def as_text(text: Any) -> Markdown:
    """Markdown that reads as `text`, on one line: no markup, no link."""
    if isinstance(text, Markdown):
        return text
    return Markdown(_ACTIVE.sub(_entity, one_line(str(text))))


def as_paragraph(text: str) -> Markdown:
    """[`as_text`] for the start of a line, where more is markup."""
    return Markdown(_STARTING.sub(_entity, as_text(text)))


def _entity(found: re.Match) -> str:
    return f"&#{ord(found[0])};"


def as_code(text: str) -> Markdown:
    """Markdown that shows `text` as code, on one line."""
    line = one_line(text)
    return Markdown(f"`{line}`" if _PLAIN_CODE.fullmatch(line) else f"<code>{as_text(line)}</code>")


def as_python(value: Any) -> str:
    """Python for a value of JSON, with double quotes, in which nothing is hidden: `eval` of it is `value`."""
    if isinstance(value, str):
        return '"' + "".join(_in_quotes(letter) for letter in value) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_python(key)}: {as_python(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_python, value)) + "]"
    return repr(value)


def _in_quotes(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    return letter if letter.isprintable() else ascii(letter)[1:-1]

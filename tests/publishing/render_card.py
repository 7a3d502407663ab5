"""A model card as the Hub shows it: its metadata, and its Markdown, with tables and HTML, as HTML."""

import re

import yaml
from markdown_it import MarkdownIt


def split_card(card: str) -> tuple[dict, str]:
    """Its metadata and its Markdown."""
    metadata, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()  # type: ignore[union-attr]
    return yaml.safe_load(metadata), text


def to_html(markdown: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)

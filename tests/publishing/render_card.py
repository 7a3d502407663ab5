"""
A model card as a page: Markdown with tables and HTML, which is what the Hub allows, and its gallery.

    python tests/render_card.py runs/shapes/README.md page.html    # then open it, narrow and wide
"""

import html
import re
import sys
from pathlib import Path

import yaml
from markdown_it import MarkdownIt


STYLE = """
body { font: 16px/1.5 "Helvetica Neue", Helvetica, Arial, sans-serif; margin: 0 auto; padding: 16px; max-width: 860px;
  color: #1f2328 }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3em } a { color: #0969da }
code, pre { font: 85% monospace; background: #f0f1f3; border-radius: 6px } code { padding: .2em .4em }
pre { padding: 16px; overflow: auto } pre code { padding: 0; font-size: 100% }
table { border-collapse: collapse; display: block; overflow: auto; width: max-content; max-width: 100% }
td, th { border: 1px solid #d1d9e0; padding: 6px 13px } blockquote { border-left: 4px solid #d1d9e0; margin: 0;
  padding: 0 1em; color: #59636e }
img { max-width: 100% }
.gallery { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)) }
figure { margin: 0; background: #f0f1f3 } figure img { width: 100% } figcaption { font-size: 13px; padding: 8px;
  max-height: 5em; overflow: auto }
"""


def split_card(card: str) -> tuple[dict, str]:
    """Its metadata and its Markdown."""
    metadata, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()  # type: ignore[union-attr]
    return yaml.safe_load(metadata), text


def to_html(markdown: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)


def to_page(card: str) -> str:
    metadata, text = split_card(card)
    figures = ""
    for entry in metadata.get("widget", []):
        url, caption = html.escape(entry["output"]["url"]), html.escape(entry["text"])
        figures += f'<figure><img src="{url}"><figcaption>{caption}</figcaption></figure>'
    body = to_html(text).replace("<Gallery />", f'<div class="gallery">{figures}</div>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    return f"<!doctype html>{head}<body>{body}</body>"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(to_page(source.read_text(encoding="utf-8")), encoding="utf-8")

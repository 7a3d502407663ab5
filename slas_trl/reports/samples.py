"""Sheets of captioned pictures, and the pictures of a model card."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..publishing.facts import Sample
from ..run_files import SAMPLES
from ..statistics import evenly_spaced


SMALLEST, LARGEST = 160, 320  # pixels of a picture's longer side on a sheet
MARGIN, FONT_SIZE = 10, 13
GALLERY, GALLERY_SIDE = 4, 768  # prompts of a model card's gallery; pixels of their longer side, at most
MOST_INPUTS, INPUT_SIDE = 4, 1024  # input pictures published, at most, for others to edit; pixels of their longer side
# The sheet of a model card, two columns wide, is legible on a phone: rows, pixels of a picture, and of the captions.
COMPARED, SIDE, SHEET_FONT_SIZE = 6, 360, 24
CAPTION_LINES = 6  # at most; longer captions end in an ellipsis

Inputs = Mapping[str, Image.Image | list[Image.Image]]  # the pictures to edit, by argument of the pipeline's call


def sample_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int | None = None,
    largest: int = LARGEST,
    font_size: int = FONT_SIZE,
) -> Image.Image:
    """
    One sheet of pictures, in RGB, with their captions under them, cut after 6 lines; by default about square, with at
    most 6 `columns`. Pictures under 160 pixels are enlarged by a whole factor without smoothing, so that every pixel
    can be seen; those with a side of more than `largest` pixels are reduced.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"expected images and one caption for each, got {len(images)} and {len(captions)}.")
    columns = min(columns or min(math.ceil(math.sqrt(len(images))), 6), len(images))
    pictures = [_readable_size(image, largest) for image in images]
    width = max(SMALLEST, *(picture.width for picture in pictures))
    font, line_height = _font(font_size), font_size + 3
    cells = list(zip(pictures, [_wrap(caption, width, font) for caption in captions], strict=True))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    # A row is as high as its highest picture and its longest caption.
    heights = [(max(p.height for p, _ in row), line_height * max(len(text) for _, text in row)) for row in rows]
    height = sum(map(sum, heights)) + MARGIN * (2 * len(rows) + 1)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, (picture_height, text_height) in zip(rows, heights, strict=True):
        bottom = top + picture_height
        for column, (picture, text) in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(picture, (left, bottom - picture.height))
            for line, words in enumerate(text):
                draw.text((left, bottom + MARGIN // 2 + line * line_height), words, fill="black", font=font)
        top = bottom + text_height + 2 * MARGIN
    return sheet


def save_samples(
    run_dir: str | Path,
    prompts: Sequence[str],
    after: Sequence[Image.Image],
    before: Sequence[Image.Image] | None = None,
    inputs: Sequence[Inputs] = (),
) -> tuple[list[Sample], str]:
    """
    Write the pictures of a model card into the folder `samples` of a run: those of 4 prompts for the gallery, a sheet
    of 6, before and after side by side, and the input pictures of the first prompt if they are 4 at most. Photographs
    are JPEG of at most 768 pixels (inputs: 1,024), so that a card has a megabyte or two.

    `after` and `before` have a picture of each of P `prompts`, the i-th drawn with seed i, and `inputs`, by argument
    of the call, the picture to edit, or a list of them. Returns samples and sheet, by paths relative to `run_dir`.
    """
    folder = Path(run_dir) / SAMPLES
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Sequence[Image.Image]] = ({} if before is None else {"before": before}) | {"after": after}
    samples = []
    for n, i in enumerate(evenly_spaced(len(prompts), GALLERY), start=1):
        sized = {when: _readable_size(images[i], GALLERY_SIDE) for when, images in drawn.items()}
        paths = {when: _save(image, folder, f"{n}_{when}") for when, image in sized.items()}
        samples.append(Sample(prompts[i], **paths, seed=i))  # type: ignore[arg-type]
    edited = [[item for v in given.values() for item in (v if isinstance(v, list) else [v])] for given in inputs]
    if edited and all(edited):
        drawn = {"edited": [pictures[0] for pictures in edited], **drawn}
        if len(edited[0]) <= MOST_INPUTS:
            samples[0].inputs = _save_inputs(folder, inputs[0])
    shown = evenly_spaced(len(prompts), COMPARED)
    rows = []
    for i in shown:
        heads = [*drawn] if i == shown[0] and len(drawn) > 1 else []
        rows.append(_side_by_side([_readable_size(images[i], SIDE, SIDE) for images in drawn.values()], heads))
    sheet = sample_grid(rows, [prompts[i] for i in shown], columns=1, largest=4 * SIDE, font_size=SHEET_FONT_SIZE)
    name = f"comparison.{'png' if max(after[0].size) <= SMALLEST else 'jpg'}"
    sheet.save(folder / name, quality=90)
    return samples, f"{SAMPLES}/{name}"


def _save(image: Image.Image, folder: Path, stem: str, quality: int = 90) -> str:
    """Write the pixels, without the metadata of a camera or program, and return the path."""
    # Pixels drawn large stay sharp; a PNG of a photograph would be several megabytes.
    name = f"{stem}.{'png' if max(image.size) <= LARGEST else 'jpg'}"
    Image.fromarray(np.asarray(image)).save(folder / name, quality=quality)
    return f"{SAMPLES}/{name}"


def _save_inputs(folder: Path, given: Inputs) -> dict[str, str | list[str]]:
    stems = iter(["1_input", *(f"1_input_{number}" for number in range(2, MOST_INPUTS + 1))])

    def save(image: Image.Image) -> str:
        return _save(_readable_size(image, INPUT_SIDE, smallest=1), folder, next(stems), quality=95)

    return {name: [*map(save, value)] if isinstance(value, list) else save(value) for name, value in given.items()}


def _side_by_side(images: Sequence[Image.Image], heads: Sequence[str]) -> Image.Image:
    """In equally wide columns, with a word over each if there are `heads`."""
    width, height = max(image.width for image in images) + MARGIN, max(image.height for image in images)
    space = SHEET_FONT_SIZE + MARGIN if heads else 0
    row = Image.new("RGB", (len(images) * width - MARGIN, space + height), "white")
    for i, image in enumerate(images):
        row.paste(image, (i * width + (width - MARGIN - image.width) // 2, space + height - image.height))
    for i, head in enumerate(heads):
        middle = (2 * i + 1) * row.width // (2 * len(heads))
        ImageDraw.Draw(row).text((middle, 0), head, fill="black", font=_font(SHEET_FONT_SIZE), anchor="ma")
    return row


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's: unlike Pillow's it has Greek, Cyrillic and most accents, and it is on every machine."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _readable_size(image: Image.Image, largest: int, smallest: int = SMALLEST) -> Image.Image:
    image, longest = image.convert("RGB"), max(image.size)
    if longest > largest:
        return image.resize([max(1, round(side * largest / longest)) for side in image.size], Image.Resampling.LANCZOS)
    factor = max(1, round(smallest / longest))
    return image.resize([side * factor for side in image.size], Image.Resampling.NEAREST)


def _wrap(caption: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels, at most 6. Words longer than a line are broken."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > CAPTION_LINES:
        lines = lines[:CAPTION_LINES]
        while font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines

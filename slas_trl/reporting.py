"""What a run leaves for people to look at: sheets of captioned pictures, curves, and tables of scores."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from scipy import stats

from slas_trl.evaluation.shapes import Estimate
from slas_trl.run_facts import Sample, spread


SMALLEST, LARGEST = 160, 320  # pixels of a picture's longer side on a sheet
MARGIN = 10
FONT_SIZE = 13
GALLERY = 4  # prompts of a model card's gallery, each with a picture before and one after
GALLERY_SIDE = 768  # pixels of their longer side, at most
MOST_INPUTS, INPUT_SIDE = 4, 1024  # of the pictures to edit, which a reader is to edit again, and of their sides
# The sheet of a model card, two columns wide, is legible on a phone: rows, pixels of a picture, and of the captions.
COMPARED, SIDE, SHEET_FONT_SIZE = 6, 360, 24
CAPTION_LINES = 6  # at most; longer captions end in an ellipsis


def sample_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int | None = None,
    largest: int = LARGEST,
    font_size: int = FONT_SIZE,
) -> Image.Image:
    """
    One sheet of pictures with their captions under them.

    Args:
        images (`Sequence[PIL.Image.Image]`):
            At least one. Those under 160 pixels are enlarged by a whole factor without smoothing, so that every pixel
            can be seen; those over `largest` are reduced.
        captions (`Sequence[str]`):
            One per image. Wrapped, and cut after 6 lines.
        columns (`int`, *optional*):
            Pictures per row. `None` is as many as make the sheet about square, but at most 6.
        largest (`int`, *optional*, defaults to 320): Pixels of a picture's longer side, at most.
        font_size (`int`, *optional*, defaults to 13): Of the captions, in pixels.

    Returns a `PIL.Image.Image` in RGB. Raises `ValueError` if there is no image, or not one caption per image.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"expected images and one caption for each, got {len(images)} and {len(captions)}.")
    columns = min(columns or min(math.ceil(math.sqrt(len(images))), 6), len(images))
    pictures = [_readable_size(image.convert("RGB"), largest) for image in images]
    width = max(max(picture.width for picture in pictures), SMALLEST)
    font, line_height = _font(font_size), font_size + 3
    texts = [_wrap(caption, width, font) for caption in captions]

    starts = range(0, len(pictures), columns)
    # A row is as high as its highest picture and its longest caption ask for.
    picture_heights = [max(picture.height for picture in pictures[i : i + columns]) for i in starts]
    text_heights = [line_height * max(len(text) for text in texts[i : i + columns]) for i in starts]
    height = sum(picture_heights) + sum(text_heights) + MARGIN * (2 * len(starts) + 1)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, start in enumerate(starts):
        for column, index in enumerate(range(start, min(start + columns, len(pictures)))):
            left = MARGIN + column * (width + MARGIN)
            picture = pictures[index]
            sheet.paste(picture, (left, top + picture_heights[row] - picture.height))
            for line, text in enumerate(texts[index]):
                below = top + picture_heights[row] + MARGIN // 2 + line * line_height
                draw.text((left, below), text, fill="black", font=font)
        top += picture_heights[row] + text_heights[row] + 2 * MARGIN
    return sheet


def save_samples(
    run_dir: str | Path,
    prompts: Sequence[str],
    after: Sequence[Image.Image],
    before: Sequence[Image.Image] | None = None,
    inputs: Sequence[Mapping[str, Image.Image | list[Image.Image]]] = (),
) -> tuple[list[Sample], str]:
    """
    Write the pictures of a model card into the folder `samples` of a run: 4 of the prompts, one file a picture, for
    the gallery, and one sheet of 6, before and after side by side. Those over 768 pixels are reduced, small ones
    enlarged without smoothing; photographs are JPEG, so that a card's pictures are a megabyte or two at most. Of the
    first prompt the pictures that it edits are there too, if they are 4 at most, reduced to 1,024 pixels.

    Args:
        run_dir (`str` or `Path`): The run's folder.
        prompts (`Sequence[str]`): P prompts.
        after (`Sequence[PIL.Image.Image]`): P pictures; the i-th was drawn with seed i.
        before (`Sequence[PIL.Image.Image]`, *optional*): The same prompts and seeds before training.
        inputs (`Sequence[Mapping]`, *optional*):
            Of pipelines that edit: what is edited, a picture or a list of them for each argument of the call.

    Returns the samples, and the sheet's path, both as seen from `run_dir`.
    """
    folder = Path(run_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)

    def save(image: Image.Image, stem: str) -> str:
        image = _readable_size(image.convert("RGB"), GALLERY_SIDE)
        # Pixels drawn large stay sharp; of a photograph, a PNG would be several megabytes.
        name = f"samples/{stem}.{'png' if max(image.size) <= LARGEST else 'jpg'}"
        image.save(Path(run_dir) / name, quality=90)
        return name

    samples = [
        Sample(
            prompt=prompts[i],
            before=None if before is None else save(before[i], f"{number}_before"),
            after=save(after[i], f"{number}_after"),
            seed=i,
        )
        for number, i in enumerate(spread(len(prompts), GALLERY), start=1)
    ]
    shown = spread(len(prompts), COMPARED)
    columns: dict[str, Sequence[Image.Image]] = {}
    edited = [_pictures_in(given) for given in inputs]
    if edited and all(edited):
        columns["edited"] = [pictures[0] for pictures in edited]
        if len(edited[0]) <= MOST_INPUTS:
            samples[0].inputs = _save_inputs(Path(run_dir), inputs[0])
    columns |= {} if before is None else {"before": before}
    columns |= {"after": after}
    pairs = [
        _side_by_side([_readable_size(images[i].convert("RGB"), SIDE, SIDE) for images in columns.values()])
        for i in shown
    ]
    if len(columns) > 1:
        pairs[0] = _headed(pairs[0], list(columns))
    sheet = sample_grid(pairs, [prompts[i] for i in shown], columns=1, largest=4 * SIDE, font_size=SHEET_FONT_SIZE)
    name = f"samples/comparison.{'png' if max(after[0].size) <= SMALLEST else 'jpg'}"
    sheet.save(Path(run_dir) / name, quality=90)
    return samples, name


def _pictures_in(given: Mapping[str, Image.Image | list[Image.Image]]) -> list[Image.Image]:
    return [picture for value in given.values() for picture in (value if isinstance(value, list) else [value])]


def _save_inputs(run_dir: Path, given: Mapping[str, Image.Image | list[Image.Image]]) -> dict[str, str | list[str]]:
    """Write what is edited, without what a camera or program has put beside the pixels, and return the paths."""
    numbers = itertools.count(1)

    def save(image: Image.Image) -> str:
        pixels = Image.fromarray(np.asarray(image.convert("RGB")))
        pixels.thumbnail((INPUT_SIDE, INPUT_SIDE))
        number = next(numbers)
        kind = "png" if max(pixels.size) <= LARGEST else "jpg"
        name = f"samples/1_input{'' if number == 1 else f'_{number}'}.{kind}"
        pixels.save(run_dir / name, quality=95)
        return name

    return {
        argument: [save(image) for image in value] if isinstance(value, list) else save(value)
        for argument, value in given.items()
    }


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """In equally wide columns."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    row = Image.new("RGB", (len(images) * (width + MARGIN) - MARGIN, height), "white")
    for i, image in enumerate(images):
        row.paste(image, (i * (width + MARGIN) + (width - image.width) // 2, height - image.height))
    return row


def _headed(row: Image.Image, heads: Sequence[str]) -> Image.Image:
    """With a word over each of the columns, which are equally wide."""
    space = SHEET_FONT_SIZE + MARGIN
    headed = Image.new("RGB", (row.width, row.height + space), "white")
    headed.paste(row, (0, space))
    draw = ImageDraw.Draw(headed)
    for i, head in enumerate(heads):
        middle = (2 * i + 1) * row.width // (2 * len(heads))
        draw.text((middle, 0), head, fill="black", font=_font(SHEET_FONT_SIZE), anchor="ma")
    return headed


def plot_training(metrics_path: str | Path, output_path: str | Path) -> None:
    """
    Draw reward, KL, clip fraction and advantage spread against steps.

    Args:
        metrics_path (`str` or `Path`): A run's `metrics.jsonl`: one JSON object a line, with "step" and TRL's metrics.
        output_path (`str` or `Path`): The picture to write; its ending names the format. Its folder has to exist.

    Metrics that were not logged leave their panel empty, with a word that says so.
    """
    history = read_metrics(metrics_path)
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    reward, kl, clip, spread = figure.subplots(2, 2, sharex=True).flatten()

    _draw(reward, history, "Reward", "reward", {"reward": "training", "eval_reward": "evaluation"})
    stds = dict(zip(*_series(history, "reward_std"), strict=True))
    band = [(step, mean, stds[step]) for step, mean in zip(*_series(history, "reward"), strict=True) if step in stds]
    if band:
        steps, means, spreads = np.array(band).T
        reward.fill_between(
            steps, means - spreads, means + spreads, color="C0", alpha=0.15, lw=0, label="± std within a group"
        )
        reward.legend(frameon=False)
    _draw(
        kl, history, "KL to the reference model", "KL per latent element (nats)", {"kl": "KL"}, "not logged: beta is 0"
    )
    _draw(clip, history, "Clip fraction", "share of clipped ratios", {"clip_ratio/region_mean": "clip fraction"})
    spread_labels = {"advantages/std": "std", "advantages/effective_share": "effective share of the samples"}
    _draw(spread, history, "Advantage spread", "advantage", spread_labels)
    for axes in (kl, clip):  # never negative: a curve that stays at 0 should lie on the floor
        if axes.lines:
            axes.set_ylim(bottom=0)
    figure.savefig(output_path)


def read_metrics(metrics_path: str | Path) -> dict[int, dict[str, float]]:
    """
    Numbers logged at each step, by step, from a run's `metrics.jsonl`.

    A run that was killed and resumed has logged some steps twice, and may have left half a line: what was logged last
    counts, and half a line does not.
    """
    history: dict[int, dict[str, float]] = {}
    for line in Path(metrics_path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        history.setdefault(record["step"], {}).update(numbers)
    return dict(sorted(history.items()))


def compare_scores(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Estimate]]:
    """
    Scores before and after training, and their difference.

    Args:
        before (`Mapping[str, Sequence[float]]`):
            By reward, one score per prompt, which is the mean over its pictures. NaN is no score.
        after (`Mapping[str, Sequence[float]]`): The same rewards and prompts, in the same order.

    Returns, by reward, [`Estimate`]s "before", "after" and "change". The change is taken prompt by prompt, so its
    interval is narrower than the other two suggest.
    """
    return {
        name: {
            "before": _estimate(before[name]),
            "after": _estimate(after[name]),
            "change": _estimate(np.subtract(after[name], before[name])),
        }
        for name in before
    }


def score_rows(comparison: Mapping[str, Mapping[str, Estimate]], first_column: str = "reward") -> list[list[str]]:
    """The head of the table that [`score_table`] makes, and its rows."""
    rows = [[first_column, "before", "after", "change"]]
    for name, estimates in comparison.items():
        rows.append([name, *(_written(estimates[column], "+" * (column == "change")) for column in rows[0][1:])])
    return rows


def score_table(comparison: Mapping[str, Mapping[str, Estimate]], first_column: str = "reward") -> str:
    """A table, in Markdown aligned for the terminal, of what [`compare_scores`] returns."""
    rows = score_rows(comparison, first_column)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """From one value per prompt, NaN for none. Student's t, for they may be few."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    mean = float(known.mean()) if len(known) else math.nan
    if len(known) < 2:
        return Estimate(mean, math.nan, math.nan, len(known))
    se = float(known.std(ddof=1)) / math.sqrt(len(known))
    return Estimate(mean, se, float(stats.t.ppf(0.975, len(known) - 1)) * se, len(known))


def _written(estimate: Estimate, sign: str) -> str:
    if math.isnan(estimate.mean):
        return "no score"
    width = "" if math.isnan(estimate.half_width) else f" ± {estimate.half_width:.4f}"
    return f"{estimate.mean:{sign}.4f}{width}"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib's own: unlike Pillow's it has Greek, Cyrillic and most accents, and it is on every machine.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _readable_size(image: Image.Image, largest: int, smallest: int = SMALLEST) -> Image.Image:
    longest = max(image.size)
    if longest > largest:
        return image.resize([max(1, round(side * largest / longest)) for side in image.size], Image.Resampling.LANCZOS)
    factor = max(1, round(smallest / longest))
    return image.resize([side * factor for side in image.size], Image.Resampling.NEAREST)


def _wrap(caption: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels. Words longer than a line are broken."""
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
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def _series(history: Mapping[int, Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    points = [(step, record[key]) for step, record in history.items() if key in record and math.isfinite(record[key])]
    return [step for step, _ in points], [value for _, value in points]


def _draw(
    axes: Axes,
    history: Mapping[int, Mapping[str, float]],
    title: str,
    unit: str,
    labels: Mapping[str, str],
    empty: str = "not logged",
) -> None:
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.xaxis.set_tick_params(labelbottom=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for key, label in labels.items():
        steps, values = _series(history, key)
        if steps:
            # A single point has no line, and evaluations are few and far between.
            marker = "o" if len(steps) == 1 or key.startswith("eval_") else None
            axes.plot(steps, values, label=label, marker=marker, linewidth=1.5)
    if not axes.lines:
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center", color="grey")
        axes.set_yticks([])
    elif len(axes.lines) > 1:
        axes.legend(frameon=False)

import json

import numpy as np
import pytest
from PIL import Image

from slas_trl.reporting import plot_training, read_metrics, sample_grid, save_samples


def pictures(count: int, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    return [Image.new("RGB", size, (255, 20 * i, 0)) for i in range(count)]


def dark_pixels(image: Image.Image) -> int:
    return int((np.asarray(image.convert("L")) < 100).sum())


class TestSampleGrid:
    def test_small_pictures_are_enlarged_without_smoothing(self):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
        sheet = sample_grid([picture], ["x"])
        enlarged = sheet.crop((10, 10, 170, 170))
        assert np.array_equal(np.asarray(enlarged)[2::5, 2::5], np.asarray(picture))
        assert np.array_equal(np.asarray(enlarged)[0::5, 4::5], np.asarray(picture))

    def test_large_pictures_are_reduced(self):
        sheet = sample_grid(pictures(1, (1024, 512)), ["x"])
        assert sheet.width == 320 + 20
        assert sheet.height < 250

    def test_captions_are_under_their_pictures(self):
        sheet = sample_grid(pictures(4), ["a red circle", "", "", "three green squares"], columns=2)
        assert sheet.width == 2 * 170 + 10
        row = sheet.height // 2
        under = [
            (10, 175, 170, row),
            (180, 175, 340, row),
            (10, row + 170, 170, sheet.height),
            (180, row + 170, 340, sheet.height),
        ]
        dark = [dark_pixels(sheet.crop(box)) for box in under]
        assert dark[0] > 50 and dark[3] > 50
        assert dark[1] == dark[2] == 0

    def test_long_captions_are_wrapped_within_the_picture_and_cut(self):
        long = "a red circle to the left of a large blue square " * 9
        sheet = sample_grid(pictures(1), [long])
        assert sheet.width == 180
        assert dark_pixels(sheet.crop((170, 0, 180, sheet.height))) == 0
        short = sample_grid(pictures(1), ["a red circle"])
        assert short.height < sheet.height < 330

    def test_a_word_longer_than_a_line_is_broken(self):
        sheet = sample_grid(pictures(1), ["w" * 60])
        assert dark_pixels(sheet.crop((170, 0, 180, sheet.height))) == 0
        assert sheet.height > sample_grid(pictures(1), ["w"]).height

    def test_pictures_of_several_sizes_and_modes(self):
        images = [Image.new("L", (32, 64), 0), Image.new("RGBA", (64, 32), (0, 0, 0, 255)), *pictures(3)]
        assert sample_grid(images, list("abcde")).mode == "RGB"

    @pytest.mark.parametrize(("images", "captions"), [([], []), (pictures(2), ["one"])])
    def test_refuses_what_does_not_match(self, images, captions):
        with pytest.raises(ValueError, match=f"got {len(images)} and {len(captions)}"):
            sample_grid(images, captions)


class TestMetrics:
    records = [
        {"step": 1, "reward": 0.1, "reward_std": 0.2, "kl": 0.0, "clip_ratio/region_mean": 0.0, "advantages/std": 1.2},
        {
            "step": 2,
            "reward": 0.3,
            "reward_std": 0.2,
            "kl": 0.01,
            "clip_ratio/region_mean": 0.1,
            "advantages/std": 1.4,
        },
        {"step": 2, "eval_reward": 0.4},
    ]

    def write(self, path, records, tail=""):
        path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
        return path

    def test_one_record_per_step_and_the_last_word_counts(self, tmp_path):
        again = [{"step": 1, "reward": 0.15, "note": "text is no metric"}]
        history = read_metrics(self.write(tmp_path / "metrics.jsonl", self.records + again, tail='{"step": 3, "rew'))
        assert list(history) == [1, 2]
        assert history[1]["reward"] == 0.15 and history[1]["kl"] == 0.0
        assert "note" not in history[1]
        assert history[2]["eval_reward"] == 0.4 and history[2]["reward"] == 0.3

    def test_the_plot_has_curves(self, tmp_path):
        plot_training(self.write(tmp_path / "metrics.jsonl", self.records), tmp_path / "training.png")
        with Image.open(tmp_path / "training.png") as plot:
            assert plot.format == "PNG"
            assert plot.width >= 800 and plot.height >= 600
            colours = np.asarray(plot.convert("RGB")).reshape(-1, 3)
        assert (colours == (31, 119, 180)).all(axis=1).sum() > 500  # matplotlib's first colour, C0

    @pytest.mark.parametrize(
        "records", [[], [{"step": 1}], [{"step": 1, "reward": float("nan")}], [{"step": 5, "reward": 1.0}]]
    )
    def test_missing_metrics_leave_their_panel_empty(self, tmp_path, records):
        plot_training(self.write(tmp_path / "metrics.jsonl", records), tmp_path / "training.png")
        assert (tmp_path / "training.png").stat().st_size > 5_000


class TestSaveSamples:
    def test_pictures_that_were_edited_are_beside_the_others(self, tmp_path):
        given = [{"image": Image.new("RGB", (2048, 1024), (0, 0, 250))}] * 6
        samples, sheet = save_samples(tmp_path, list("abcdef"), pictures(6), pictures(6), given)
        assert samples[0].inputs == {"image": "samples/1_input.jpg"} and not any(s.inputs for s in samples[1:])
        with Image.open(tmp_path / "samples" / "1_input.jpg") as kept:
            assert kept.size == (1024, 512)
        _, narrow = save_samples(tmp_path / "texts", list("abcdef"), pictures(6), pictures(6), [{}] * 6)
        with Image.open(tmp_path / sheet) as three, Image.open(tmp_path / "texts" / narrow) as two:
            assert three.width > 1.4 * two.width
            first, *others = (three.getpixel((10 + (2 * i + 1) * (three.width - 20) // 6, 250)) for i in range(3))
            assert first[2] > 200 and all(blue < 50 for _, _, blue in others)  # each in its column, under its head

    def test_several_pictures_of_one_prompt(self, tmp_path):
        mask = pictures(1)[0]
        given = [{"image": pictures(3), "mask": mask}]
        [sample], _ = save_samples(tmp_path, ["a"], pictures(1), None, given)
        assert sample.inputs["mask"] == "samples/1_input_4.png" and len(sample.input_paths) == 4
        for other in ({"image": pictures(4), "mask": mask}, {"image": pictures(5)}, {"image": []}):
            [sample], _ = save_samples(tmp_path / "more", ["a"], pictures(1), None, [other])
            assert not sample.inputs and not list((tmp_path / "more" / "samples").glob("*input*"))

import numpy as np
import pytest
from PIL import Image

from slas_trl.reports.samples import sample_grid, save_samples


def pictures(count: int, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    return [Image.new("RGB", size, (255, 20 * i, 0)) for i in range(count)]


def dark_pixels(image: Image.Image) -> int:
    return int((np.asarray(image.convert("L")) < 100).sum())


class TestSampleGrid:
    def test_small_pictures_are_enlarged_without_smoothing_and_large_ones_reduced(self):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
        enlarged = np.asarray(sample_grid([picture], ["x"]).crop((10, 10, 170, 170)))
        assert all(np.array_equal(enlarged[i::5, j::5], np.asarray(picture)) for i, j in ((2, 2), (0, 4)))
        large = sample_grid(pictures(1, (1024, 512)), ["x"])
        assert large.width == 320 + 20 and large.height < 250

    def test_captions_are_under_their_pictures(self):
        sheet = sample_grid(pictures(4), ["a red circle", "", "", "three green squares"], columns=2)
        assert sheet.width == 2 * 170 + 10
        row = sheet.height // 2
        tops = ((175, row), (row + 170, sheet.height))
        dark = [dark_pixels(sheet.crop((x, top, x + 160, bottom))) for top, bottom in tops for x in (10, 180)]
        assert dark[0] > 50 and dark[3] > 50 and dark[1] == dark[2] == 0

    @pytest.mark.parametrize("long", ["a red circle to the left of a large blue square " * 9, "w" * 600])
    def test_long_captions_and_words_are_wrapped_within_the_picture_and_cut(self, long):
        sheet = sample_grid(pictures(1), [long])
        assert sheet.width == 180 and dark_pixels(sheet.crop((170, 0, 180, sheet.height))) == 0
        assert sample_grid(pictures(1), ["a red circle"]).height < sheet.height < 330

    def test_pictures_of_several_sizes_and_modes(self):
        images = [Image.new("L", (32, 64), 0), Image.new("RGBA", (64, 32), (0, 0, 0, 255)), *pictures(3)]
        assert sample_grid(images, list("abcde")).mode == "RGB"

    @pytest.mark.parametrize(("images", "captions"), [([], []), (pictures(2), ["one"])])
    def test_refuses_what_does_not_match(self, images, captions):
        with pytest.raises(ValueError, match="caption"):
            sample_grid(images, captions)


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
        assert sample.inputs["mask"] == "samples/1_input_4.png" and len(sample.paths) == 5
        for other in ({"image": pictures(4), "mask": mask}, {"image": pictures(5)}, {"image": []}):
            [sample], _ = save_samples(tmp_path / "more", ["a"], pictures(1), None, [other])
            assert not sample.inputs and not list((tmp_path / "more" / "samples").glob("*input*"))

    def test_metadata_of_a_camera_is_not_published(self, tmp_path):
        exif = Image.Exif()
        exif[0x010F] = "a camera"
        pictures(1)[0].save(tmp_path / "photo.jpg", exif=exif)
        with Image.open(tmp_path / "photo.jpg") as photo:
            assert photo.getexif()
            [sample], _ = save_samples(tmp_path, ["a"], [photo], None, [{"image": photo}])
        for path in sample.paths:
            with Image.open(tmp_path / path) as written:
                assert not written.getexif()

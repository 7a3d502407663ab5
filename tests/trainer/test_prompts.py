"""Prompts from files, and what is said of files without."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from slas_trl.trainer.prompts import check_prompts, load_prompts


ROWS = [{"prompt": "a cat, sleeping", "tag": "cat"}, {"prompt": "zwei Hunde im Größenvergleich", "tag": "dog"}]


def written(path, rows=ROWS) -> str:
    """`rows` in the format of the file's name."""
    if path.suffix == ".txt":
        path.write_text("".join(row["prompt"] + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        columns = list(rows[0])
        mark, quote = {".csv": (",", '"'), ".tsv": ("\t", "")}[path.suffix]
        lines = [mark.join(columns), *(mark.join(f"{quote}{row[c]}{quote}" for c in columns) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What `datasets` keeps of a file goes with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


NO_ENDS = "a\u2028b\u2029c\x85d\fe\vf\x1cg"  # which Python's splitlines takes for ends of lines
WORDS = ["None", "null", "NA", "nan", "N/A", "1984", "True", "007", "1e5"]  # which a reader of tables takes for values


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".JSONL", ".Csv"])
def test_prompts_are_read_as_they_stand(tmp_path, suffix):
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate([*WORDS, "a cat, asleep", NO_ENDS, "é ü 東"])]
    path = tmp_path / f"prompts{suffix.lower()}"
    written(path, rows)
    data = load_prompts(str(path.rename(tmp_path / f"prompts{suffix}")))
    assert list(data["prompt"]) == [row["prompt"] for row in rows]
    if suffix != ".txt":
        assert list(data["number"]) == [row["number"] for row in rows]


def test_other_columns_keep_their_types(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,count,share,flag,note,image\na,1,0.5,True,NA,a.png\nb,2,1.5,False,,b.png\n")
    (tmp_path / "a.png").write_text("")
    data = load_prompts(str(path))
    row = {"prompt": "a", "count": 1, "share": 0.5, "flag": True, "note": "NA", "image": f"{tmp_path}/a.png"}
    assert data[0] == row and data[1]["note"] is None
    for mark, suffix in ((",", "csv"), ("\t", "tsv")):
        path.with_suffix(f".{suffix}").write_text(f"prompt{mark}target_text\na sign{mark}1984\na wall{mark}NA\n")
        assert load_prompts(str(path.with_suffix(f".{suffix}")))["target_text"] == ["1984", "NA"]  # it is read as text
    rows = [{"prompt": "a", "n": 1, "of": {"a": [1]}}, {"prompt": "b", "n": 2.5, "of": {"b": "x"}, "more": ["y"]}]
    data = load_prompts(written(tmp_path / "prompts.json", rows))
    assert list(data) == [{**rows[0], "more": None}, rows[1]]
    assert load_prompts(written(tmp_path / "prompts.json", ["a cat", "two dogs"]))["prompt"] == ["a cat", "two dogs"]


def test_quotes_are_part_of_a_cell_between_tabs(tmp_path):
    rows = [{"prompt": prompt, "n": 1} for prompt in ('"Hello" sign', '"G I G G L E" painted in', '"')]
    assert list(load_prompts(written(tmp_path / "prompts.tsv", rows))) == rows


@pytest.mark.parametrize(("suffix", "encoding"), [(".txt", "latin-1"), (".csv", "utf-16-le")])
def test_a_file_of_another_encoding(tmp_path, suffix, encoding):
    path = tmp_path / f"prompts{suffix}"
    path.write_text(Path(written(path)).read_text(encoding="utf-8"), encoding=encoding)
    with pytest.raises(ValueError, match="UTF-8"):
        load_prompts(str(path))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="prompts.txt"):
        load_prompts(str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize("name", ["", " ", "nowhere.py", "folder", "no name"])
def test_what_is_no_data_set(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("folder").mkdir()
    with pytest.raises(ValueError, match=f"The prompts '{name}' cannot be read.*Expected"):
        load_prompts(name)


def test_blank_lines_and_those_of_windows_in_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff\r\n  a cat  \r\n\r\n\t\r\ntwo dogs".encode())
    assert list(load_prompts(str(path))["prompt"]) == ["a cat", "two dogs"]


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = tmp_path / "prompts.parquet"
    load_prompts(written(path))
    assert len(load_prompts(written(path, [*ROWS, {"prompt": "snow", "tag": "x"}]))) == 3


def test_the_embedded_world():
    train, test = load_prompts("shapes"), load_prompts("shapes", "test")
    assert len(train) and not set(train["prompt"]) & set(test["prompt"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.txt", "\n \n", "is empty"),
        ("prompts.jsonl", "", "is empty"),
        ("prompts.csv", "prompt\n", "is empty"),
        ("prompts.json", '[{"prompt": "a c', "cannot be read"),
        ("prompts.parquet", "a cat", "cannot be read"),
        ("prompts.csv", "prompt\na cat, asleep\n", "more fields than its header; quote"),
        ("script.py", "a cat", "of no format that is read"),
        ("prompts.jsonl", '{"caption": "a cat", "tag": "cat"}', r"no column 'prompt'.*\['caption', 'tag'\]"),
    ],
)
def test_a_file_without_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("data", "error", "named"),
    [
        ({"prompt": ["a cat", "", "\t"]}, ValueError, "row 1 has"),
        ({"prompt": [None, "a cat"]}, ValueError, "row 0 has"),
        ({"prompt": [1, 2]}, ValueError, "row 0 has"),
        ({"prompt": [[{"role": "user", "content": "a cat"}]]}, ValueError, "row 0 has"),
        (
            {"prompt": ["a cat"], "images": ["a dog"]},
            ValueError,
            "the column 'images'",
        ),  # which rewards know otherwise
        (DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}), TypeError, "DatasetDict.*splits"),
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), TypeError, "IterableDataset.*from_list"),
    ],
)
def test_data_sets_that_cannot_be_used(data, error, named):
    with pytest.raises(error, match=f"train_dataset .*{named}"):
        check_prompts(Dataset.from_dict(data) if type(data) is dict else data, "train_dataset")

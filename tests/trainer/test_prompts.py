"""Prompts from files, and what is said of files without."""

import json
import re
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
        path.write_text(json.dumps(rows), encoding="utf-8")
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


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_a_file(tmp_path, suffix):
    data = load_prompts(written(tmp_path / f"prompts{suffix}"))
    assert list(data["prompt"]) == [row["prompt"] for row in ROWS]
    if suffix != ".txt":
        assert list(data["tag"]) == ["cat", "dog"]


NO_ENDS = "a\u2028b\u2029c\x85d\fe\vf\x1cg"  # which Python's splitlines takes for ends of lines
WORDS = ["None", "null", "NA", "nan", "N/A", "1984", "True", "007", "1e5"]  # which a reader of tables takes for values


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".tsv", ".TXT", ".JSONL", ".Csv"])
def test_prompts_are_read_as_they_stand(tmp_path, suffix, monkeypatch):
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate([*WORDS, NO_ENDS, "é ü 東"])]
    path = tmp_path / f"prompts{suffix.lower()}"
    written(path, rows)
    path = path.rename(tmp_path / f"prompts{suffix}")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")  # where nothing can be kept
    data = load_prompts(str(path))
    assert data["prompt"] == [row["prompt"] for row in rows]
    if suffix.lower() != ".txt":
        assert data["number"][:2] == [0, 1] or suffix == ".Csv"


def test_other_columns_keep_their_types(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,count,share,flag,note,image\na,1,0.5,True,NA,a.png\nb,2,1.5,False,,b.png\n")
    (tmp_path / "a.png").write_text("")
    data = load_prompts(str(path))
    assert data[0] == {
        "prompt": "a",
        "count": 1,
        "share": 0.5,
        "flag": True,
        "note": "NA",
        "image": f"{tmp_path}/a.png",
    }
    assert data[1]["note"] is None
    rows = [{"prompt": "a", "n": 1, "of": {"a": [1]}}, {"prompt": "b", "n": 2.5, "of": {"b": "x"}, "more": ["y"]}]
    data = load_prompts(written(tmp_path / "prompts.json", rows))
    assert list(data) == [{**rows[0], "more": None}, rows[1]]
    assert load_prompts(written(tmp_path / "prompts.json", ["a cat", "two dogs"]))["prompt"] == ["a cat", "two dogs"]


def test_rows_of_json_on_several_lines(tmp_path):
    path = tmp_path / "prompts.json"
    rows = [{"prompt": 'a "b"', "of": {"a": ["x", 1]}, "more": "y"}, {"prompt": "c\\", "of": None, "more": "}"}]
    for text in (json.dumps(rows, indent=2), "\n\n".join(json.dumps(row, indent=1) for row in rows)):
        path.write_text(text)
        assert list(load_prompts(str(path))) == rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_text_that_is_to_be_read_is_text(tmp_path, suffix):
    mark = "," if suffix == ".csv" else "\t"
    path = tmp_path / f"prompts{suffix}"
    path.write_text(f"prompt{mark}target_text\na sign{mark}1984\na wall{mark}NA\n")
    assert load_prompts(str(path))["target_text"] == ["1984", "NA"]


def test_quotes_are_part_of_a_cell_between_tabs(tmp_path):
    rows = [
        {"prompt": '"Hello" sign', "n": 1},
        {"prompt": '"G I G G L E" painted in', "n": 2},
        {"prompt": '"', "n": 3},
    ]
    assert list(load_prompts(written(tmp_path / "prompts.tsv", rows))) == rows


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_a_file_of_another_encoding(tmp_path, suffix, encoding):
    path = tmp_path / f"prompts{suffix}"
    path.write_text(Path(written(path)).read_text(encoding="utf-8"), encoding=encoding)
    with pytest.raises(ValueError, match="UTF-8"):
        load_prompts(str(path))


@pytest.mark.parametrize("name", ["", " ", "prompts.jsonl.gz", "script.py", "nowhere.py", "folder", "no name"])
def test_what_is_no_data_set(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("folder").mkdir()
    for file in ("prompts.jsonl.gz", "script.py"):
        Path(file).write_text("a cat")
    with pytest.raises(ValueError, match=f"The prompts '{name}' cannot be read.*Expected"):
        load_prompts(name)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = written(tmp_path / "prompts.parquet")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(ValueError, match="prompts.parquet.*Set HF_HOME"):
        load_prompts(path)


def test_blank_lines_and_those_of_windows_in_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff\r\n  a cat  \r\n\r\n\t\r\ntwo dogs".encode())
    assert list(load_prompts(str(path))["prompt"]) == ["a cat", "two dogs"]


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = tmp_path / "prompts.jsonl"
    load_prompts(written(path))
    assert len(load_prompts(written(path, [*ROWS, {"prompt": "snow", "tag": "x"}]))) == 3


def test_the_embedded_world():
    train, test = load_prompts("shapes"), load_prompts("shapes", "test")
    assert len(train) and not set(train["prompt"]) & set(test["prompt"])


@pytest.mark.parametrize("suffix", [".txt", ".parquet"])
def test_a_missing_file(tmp_path, suffix):
    path = tmp_path / f"prompts{suffix}"
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(path)))):
        load_prompts(str(path))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        *((suffix, "\n \n") for suffix in (".txt", ".json", ".jsonl", ".csv", ".tsv")),
        (".csv", "prompt\n"),
        (".txt", ""),
    ],
)
def test_an_empty_file(tmp_path, suffix, content):
    path = tmp_path / f"prompts{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match="is empty"):
        load_prompts(str(path))


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_broken_file(tmp_path, suffix):
    path = tmp_path / f"prompts{suffix}"
    path.write_text('[{"prompt": "a c')
    with pytest.raises(ValueError, match="cannot be read"):
        load_prompts(str(path))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_prompt_that_is_cut_by_its_own_comma(tmp_path, suffix):
    path = tmp_path / f"prompts{suffix}"
    path.write_text("prompt\na cat, asleep\n".replace(",", "," if suffix == ".csv" else "\t"))
    with pytest.raises(ValueError, match="more fields than its header; quote"):
        load_prompts(str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_without_the_column(tmp_path, suffix):
    path = written(tmp_path / f"prompts{suffix}", [{"caption": "a cat", "tag": "cat"}])
    with pytest.raises(ValueError, match=r"no column 'prompt'.*\['caption', 'tag'\]"):
        load_prompts(path)


CHAT = [{"role": "user", "content": "a cat"}]


@pytest.mark.parametrize(
    ("prompts", "rows"),
    [
        (["a cat", ""], r"\[1\]"),
        (["  ", "snow", "\t"], r"\[0, 2\]"),
        ([None, "a cat"], r"\[0\]"),
        ([1, 2], r"\[0, 1\]"),
        ([""] * 9, r".* \.\.\."),
        ([CHAT], r"\[0\].*'role': 'user'"),
    ],
)
def test_rows_without_a_prompt_are_named(prompts, rows):
    with pytest.raises(ValueError, match=f"train_dataset has rows without a prompt: {rows}"):
        check_prompts(Dataset.from_dict({"prompt": prompts}), "train_dataset")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}), "DatasetDict.*splits"),
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), "IterableDataset.*from_list"),
        ([{"prompt": "a cat"}], "list.*from_list"),
    ],
)
def test_what_is_no_data_set_in_python(data, what):
    with pytest.raises(TypeError, match=f"train_dataset must be a datasets.Dataset, but it is a {what}"):
        check_prompts(data, "train_dataset")


@pytest.mark.parametrize("name", ["prompts", "images", "completions"])
def test_a_column_whose_name_a_reward_knows_otherwise(name):
    with pytest.raises(ValueError, match=f"train_dataset has the column '{name}'"):
        check_prompts(Dataset.from_dict({"prompt": ["a cat"], name: ["a dog"]}), "train_dataset")

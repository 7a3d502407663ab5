"""A script for `test_launch.py`: writes down what its process was given, and does as it is told."""

import json
import os
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> None:
    folder, what = Path(argv[0]), argv[1:]
    rank = os.environ.get("RANK", "alone")
    (folder / f"{rank}.json").write_text(json.dumps({"environ": dict(os.environ), "argv": argv}))
    if "all-bad-input" in what:
        raise ValueError("no such thing")
    if "one-bug" in what and rank == "1":
        raise RuntimeError("a bug in one of them")
    if "wait" in what or "one-bug" in what:
        try:
            time.sleep(60)
        finally:  # what is saved after Ctrl-C takes its time
            (folder / f"{rank}.saving").touch()
            time.sleep(60 if "stubborn" in what else 0.5)
            (folder / f"{rank}.saved").touch()


if __name__ == "__main__":
    main(sys.argv[1:])

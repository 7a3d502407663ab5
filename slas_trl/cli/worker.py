"""
What each process of a launch runs: the script, whose error it writes into a file for the launcher to report.

    python -m slas_trl.cli.worker FOLDER MODULE [ARGUMENT ...]
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from slas_trl.cli.main import BAD_INPUT, call_script


def main(folder: str, module: str, *argv: str) -> int:
    """Run the script, and return its exit status, 2 for bad input, 1 for any other error, or 130 for Ctrl-C."""
    try:
        return call_script(module, list(argv))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        status = 2 if isinstance(error, BAD_INPUT) else 1
        written = {
            "status": status,
            "time": time.time_ns(),
            "rank": int(os.environ["RANK"]),
            "message": str(error) or type(error).__name__,
            "traceback": traceback.format_exc(),
        }
        path = Path(folder) / f"{written['rank']}.json"
        path.with_suffix(".tmp").write_text(json.dumps(written), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)  # whole, should the launcher end this process now
        return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

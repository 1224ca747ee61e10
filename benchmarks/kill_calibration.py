"""Kill a calibration at random moments: does the resumed run end with the same bytes?

    python benchmarks/kill_calibration.py --kills 20

Each round starts a calibration in a process of its own, kills it (SIGKILL) at a random moment, and
lets the next process go on from its checkpoints. At the end the gates, the losses and the last
checkpoints must equal those of a run that nobody disturbed. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(out: Path, checkpoints: Path) -> subprocess.Popen[bytes]:
    """Start a calibration; returns when training is about to begin."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "support.calibrate_planted", str(out), str(checkpoints)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    process.stderr.readline()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every finished file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def main(kills: int, seed: int) -> bool:
    """Run the comparison; return whether everything is equal."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process, begin = start(folder / "whole", folder / "checkpoints-whole"), time.perf_counter()
        process.communicate()
        duration = time.perf_counter() - begin
        landed = 0
        while landed < kills:
            process = start(folder / "parts", folder / "checkpoints")
            # Short of a whole run, so that many kills fall into one calibration.
            time.sleep(draw.uniform(0, duration / 3))
            landed += process.poll() is None
            process.kill()
            process.communicate()
        process = start(folder / "parts", folder / "checkpoints")
        errors = process.communicate()[1].decode()
        equal = {
            "finished": process.returncode == 0,
            "gates": contents(folder / "parts") == contents(folder / "whole"),
            "checkpoints": contents(folder / "checkpoints")
            == contents(folder / "checkpoints-whole"),
        }
    print(
        json.dumps(
            {
                "command": "benchmarks/kill_calibration.py",
                "kills": landed,
                "seed": seed,
                "uninterrupted_seconds": round(duration, 2),
                **equal,
                "errors": "" if equal["finished"] else errors[-2000:],
            }
        )
    )
    return all(equal.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(0 if main(options.kills, options.seed) else 1)

"""Wall time of the README's two commands, from a clean clone and an empty cache.

    python benchmarks/front_door.py [--skip-tests]

Clones the committed state of this repository into a temporary folder, runs ``make exam`` twice and
``make test`` once there, opens the default model from the cache in a fresh process, and prints what
each took. Downloads count, so the first exam depends on the package index. Nothing is left behind.
"""

import argparse
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OPEN = "import eyechart; eyechart.load(device='cpu'); print('ready', flush=True)"


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def timed_until_ready(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Until the model is there; what the interpreter then takes to end is not its opening."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    seconds = time.perf_counter() - start
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--skip-tests", action="store_true")
    skip_tests = parser.parse_args().skip_tests
    with tempfile.TemporaryDirectory() as work:
        clone = Path(work) / "eyechart"
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
        environment = {**os.environ, "EYECHART_CACHE": str(Path(work) / "cache")}
        runs = {
            "make exam, first time": ["make", "exam"],
            "make exam, second time": ["make", "exam"],
            "opening the default model from the cache": [".venv/bin/python", "-c", OPEN],
            "eyechart --help": [".venv/bin/eyechart", "--help"],
            "make test, after make exam": ["make", "test"],
        }
        if skip_tests:
            del runs["make test, after make exam"]
        print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}\n")
        print("| | seconds |\n|---|---|")
        for name, command in runs.items():
            clock = timed_until_ready if command[-1] == OPEN else timed
            print(f"| {name} | {clock(command, clone, environment):.1f} |", flush=True)


if __name__ == "__main__":
    main()

"""Start-up: `import palimpsest` and `palimpsest --help` against a bare Python and `import torch`.

All four are timed in one run, interleaved, so that their ratios hold on a busy machine too.

    .venv/bin/python benchmarks/import_time.py [rounds]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import palimpsest": ["-c", "import palimpsest"],
    "palimpsest --help": ["-m", "palimpsest", "--help"],
    "import torch": ["-c", "import torch"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for arguments in COMMANDS.values():  # fills the file cache; not timed
        seconds(arguments)
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    medians = {name: statistics.median(values) for name, values in times.items()}
    bare, torch = medians["python -c pass"], medians["import torch"]
    print(f"median of {rounds} interleaved rounds, Python {sys.version.split()[0]}")
    print(f"{'':20}{'median s':>10}{'min s':>9}{'max s':>9}{'x bare':>9}{'of torch':>10}")
    for name, values in times.items():
        median = medians[name]
        print(
            f"{name:20}{median:10.3f}{min(values):9.3f}{max(values):9.3f}"
            f"{median / bare:9.1f}{median / torch:10.1%}"
        )


if __name__ == "__main__":
    main()

"""One line for each result file of ``run``: how fast that layout was.

    python examples/slurm/summary.py sweep-12-*.jsonl

All requests of a file were given at once, so TTFT has the wait for a place in it, and the longest total is
the whole run.
"""

import json
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} RESULTS.jsonl …")
    print(f"{'file':40} {'requests':>8} {'failed':>6} {'tokens/s':>9} {'TTFT P50':>9} {'P99':>7} "
          f"{'TPOT P50':>9} {'P99':>7}")
    for path in map(Path, sys.argv[1:]):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        good = [line for line in lines if not line.get("error")]
        if not good:
            print(f"{path.stem:40} {len(lines):8} {len(lines):6}")
            continue
        timings = [line["timing"] for line in good]
        tokens = sum(line["usage"]["completion_tokens"] for line in good)
        ttft, tpot = (np.percentile([timing[name] for timing in timings], [50, 99])
                      for name in ("ttft", "tpot"))
        print(f"{path.stem:40} {len(lines):8} {len(lines) - len(good):6} "
              f"{tokens / max(timing['total'] for timing in timings):9.1f} {ttft[0]:8.3f}s {ttft[1]:6.3f}s "
              f"{tpot[0]:8.4f}s {tpot[1]:6.4f}s")


if __name__ == "__main__":
    main()

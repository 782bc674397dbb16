"""Every example runs, as its own first lines say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
EXPECTED = {
    "hello.py": "a process of adapting to new information",
    "stream.py": "[river]",
    "batch.py": '"error": null',
    "compare.py": "ITL P99",
    "executors.py": "tokens: [253, 980, 282",
}

pytestmark = [pytest.mark.model, pytest.mark.openmpi_only]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example(name: str, model: Path) -> None:
    text = (ROOT / "examples" / name).read_text()
    line = re.search(r"^    python (-m disagg_mpi launch .*?)(?: \[.*)?$", text, re.M)
    assert line is not None, "an example says how it is run"
    done = subprocess.run([sys.executable, *shlex.split(line[1])], cwd=ROOT, text=True, capture_output=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout, done.stdout

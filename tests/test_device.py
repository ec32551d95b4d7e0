"""Tests on a pretended device, in a process of their own: torch knows of one for as long as a process lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_everything_runs_on_another_device() -> None:
    tests = Path(__file__).parent / "on_pretended_device.py"
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0 and " passed" in told.stdout, told.stdout[-5000:] + told.stderr[-2000:]

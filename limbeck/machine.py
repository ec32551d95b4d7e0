"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import limbeck


def versions() -> dict[str, str]:
    """What a bit-equal repetition needs."""
    return {"limbeck": limbeck.__version__, "torch": torch.__version__, "python": platform.python_version()}


def machine() -> dict[str, str | int]:
    """Processor, cores and threads."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def peak_memory_mib() -> int | None:
    """Largest resident memory of this process so far, in MiB; None where the system does not tell.

    Not getrusage's: that counts the parent's memory at the time of the fork.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((round(int(line.split()[1]) / 1024) for line in lines if line.startswith("VmHWM:")), None)


def commit() -> str | None:
    """Commit of the checkout that Limbeck runs from, with "+" for local changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")

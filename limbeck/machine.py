"""What a result was measured on."""

from __future__ import annotations

import os
import platform
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

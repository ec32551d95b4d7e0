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
    """Processor, cores and threads, and the GPU if there is one."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        **gpu,
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
    """Commit of the checkout that Limbeck runs from, with "+" for local changes; None outside a checkout.

    Changes of results/ do not count: a long acceptance writes there between its measurements. An
    environment inside the checkout of something else does not count: git must know this very file.
    """
    this = Path(__file__)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=this.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", this.name)
        # without locks: a signal that ends this process in between would leave one in the repository
        status = ["--no-optional-locks", "status", "--porcelain", "--", ":/", ":(top,exclude)results"]
        return git("rev-parse", "HEAD") + ("+" if git(*status) else "")
    except (OSError, subprocess.CalledProcessError):
        return None

"""Fetch the files of onnxruntime-web that run a generator in the browser, with npm: web_runtime.py DIR."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from limbeck.export.web import RUNTIME, RUNTIME_VERSION, check_runtime


def fetch(folder: Path) -> None:
    """Put the pinned files into `folder`; files of the right hash that are there already stay."""
    try:
        check_runtime(folder)
        return
    except ValueError:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        # packed, not installed: no script of the package or of what it depends on is run
        subprocess.run(["npm", "pack", "--silent", f"onnxruntime-web@{RUNTIME_VERSION}"], cwd=work, check=True)
        (archive,) = Path(work).glob("*.tgz")
        with tarfile.open(archive) as packed:
            for name in RUNTIME:
                content = packed.extractfile(f"package/dist/{name}")
                assert content is not None
                (folder / name).write_bytes(content.read())
    check_runtime(folder)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))

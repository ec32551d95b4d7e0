"""A folder in which a generator runs in the visitor's browser.

One HTML file that holds its style, its script and a content security policy under which it reaches nothing but its own
folder; model.onnx; and the three files of onnxruntime-web that run it, copied from a folder that holds exactly the
pinned version. Any static host can serve it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shutil
import sys
import webbrowser
from collections.abc import Callable, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from typing import Any

import limbeck
from limbeck import artifact, methods
from limbeck.export import graph
from limbeck.files import sha256
from limbeck.generator import Generator

RUNTIME_VERSION = "1.30.0"
# SHA-256 of the files in dist/ of the npm package onnxruntime-web (MIT)
RUNTIME = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}


def check_runtime(folder: Path) -> None:
    """Raise ValueError unless `folder` holds the three files of onnxruntime-web in the pinned version."""
    for name, digest in RUNTIME.items():
        if not (folder / name).is_file():
            raise ValueError(
                f"runtime: {folder} has no {name}; get onnxruntime-web {RUNTIME_VERSION} with `make web-runtime` or "
                f"`npm pack onnxruntime-web@{RUNTIME_VERSION}`, and name the folder with --runtime DIR"
            )
        if sha256(folder / name) != digest:
            raise ValueError(f"runtime: {folder / name} is not that of onnxruntime-web {RUNTIME_VERSION}")


def write_folder(generator: Generator, card: Mapping[str, Any], folder: Path, runtime: Path) -> tuple[float, int]:
    """Fill `folder`; returns what `check.compare` returns for the ONNX model.

    Raises:
        ValueError: if the samples cannot be drawn, or `runtime` does not hold the pinned files.
    """
    shape = tuple(generator.shape)
    if shape != (2,) and (len(shape) != 3 or shape[0] not in (1, 3, 4)):
        raise ValueError(f"to: the page draws images (C, H, W) with 1, 3 or 4 channels and points (2,), not {shape}")
    check_runtime(runtime)
    checked = graph.write_onnx(generator, card, folder / "model.onnx")
    for name in RUNTIME:
        shutil.copyfile(runtime / name, folder / name)
    text = page(generator, card, (folder / "model.onnx").stat().st_size)
    (folder / "index.html").write_text(text, encoding="utf-8", errors="replace")  # a card may hold lone surrogates
    return checked


def page(generator: Generator, card: Mapping[str, Any], size: int) -> str:
    """The HTML file for a model of `size` bytes."""
    template, script = (artifact.bundled(f"web.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "js"))
    style = "".join(artifact.bundled(f"{name}.css").read_text(encoding="utf-8") for name in ("report", "web"))
    # the browser hashes exactly what stands between the tags: a line feed and the script
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    points = len(generator.shape) == 1
    things, thing = ("points", "1,000 points") if points else ("images", "image")
    facts = {
        "points": points,
        "shape": list(generator.shape),
        "latent": list(generator.latent_shape),
        "classes": generator.classes,
        "megabytes": f"{size / 1e6:.1f}",
    }
    title, heading = _heading(card)
    steps = "one step" if generator.nfe == 1 else f"{generator.nfe} steps"
    return Template(template).substitute(
        title=html.escape(f"{title} · Limbeck"),
        heading=heading,
        calls=generator.nfe,
        lead=f"These {things} are drawn in <em>{steps}</em> each, by a network that runs in your browser. "
        "Nothing leaves this device.",
        between="Between two points" if points else "Between two samples",
        how="Choose two points above, then see where the noises between their noises land."
        if points
        else "Choose two samples above, then move from the noise of one to the noise of the other.",
        unit=f"per {thing}",
        parameters=f"{sum(p.numel() for p in generator.parameters()):,}",
        facts=json.dumps(facts).replace("<", "\\u003c"),
        footer=f"Made by Limbeck {limbeck.__version__}. Run by ONNX Runtime Web {RUNTIME_VERSION} (MIT).",
        style=style,
        script=script,
        script_hash=f"sha256-{digest}",
    )


def _heading(card: Mapping[str, Any]) -> tuple[str, str]:
    """Title as text and as HTML: what was distilled, by which method."""
    recipe = card.get("recipe", {})
    teacher, method = recipe.get("teacher"), recipe.get("method")
    if not isinstance(teacher, str):
        return "One-step generator", "A one-step generator"
    name = method.get("name") if isinstance(method, dict) else method
    known = methods.TABLE.get(name) if isinstance(name, str) else None
    by = "" if known is None else f", distilled with {known.title}"
    return teacher + by, html.escape(teacher) + (by and f'<span class="with">{html.escape(by)}</span>')


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012, the base class declares it
        ".html": "text/html; charset=utf-8",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        "": "application/octet-stream",
    }

    def end_headers(self) -> None:
        # an isolated page may use threads
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a visitor who leaves while a file is on its way."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def server(folder: Path, port: int, handler: type[_Handler] = _Handler) -> ThreadingHTTPServer:
    """A server of `folder` for this machine alone, at a free port if `port` is 0."""
    return _Server(("127.0.0.1", port), partial(handler, directory=str(folder)))


def serve(folder: Path, port: int, tell: Callable[[str], None]) -> None:
    """Serve `folder` and open it in the browser, until Ctrl-C."""
    with server(folder, port) as running:
        address = f"http://127.0.0.1:{running.server_port}"
        tell(f"{address}  (Ctrl-C ends it)")
        webbrowser.open(address)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            tell("stopped")

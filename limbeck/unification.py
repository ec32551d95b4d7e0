"""The table behind Uni-Instruct: what each f-divergence makes of the three terms, and which method that is.

With h = r^2 f''(r), the gradient of E_p[h |D_fake - D_real|^2] at one noise level is the sum of three terms with the
weights 2h, h - r h' and r^2 h'' (`methods.uni_instruct`). Plain text, so that it prints without importing torch; a test
compares every formula with `divergence.DIVERGENCES`, and every special case with the method that it names.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One f: its key in `DIVERGENCES`, f(r), the weights of the three terms, and what it recovers."""

    divergence: str
    f: str
    score: str
    path: str
    pull: str
    recovers: str


ROWS = (
    Row("reverse_kl", "-ln r", "2", "1", "0", "2 SiD(alpha = 1/2); path weight 2 (1 - alpha): 2 SiD(alpha), 0: SIM"),
    Row("forward_kl", "r ln r", "2 r", "0", "0", "at r = 1: 2 SiD(alpha = 1)"),
    Row("jeffreys", "(r - 1) ln r", "2 (1 + r)", "1", "0", "reverse_kl + forward_kl"),
    Row(
        "jensen_shannon", "r ln r - (r + 1) ln((r + 1)/2)", "2 r/(1 + r)", "r^2/(1 + r)^2", "-2 r^2/(1 + r)^3",
        "f_distill(jensen_shannon), integrated over levels",
    ),
    Row("hellinger", "(sqrt(r) - 1)^2", "sqrt(r)", "sqrt(r)/4", "-sqrt(r)/8", "f_distill(hellinger), integrated"),
    Row("pearson", "(r - 1)^2", "4 r^2", "-2 r^2", "4 r^2", "f_distill(pearson), integrated"),
    Row("neyman", "(1 - r)^2/r", "4/r", "4/r", "4/r", "f_distill(neyman), integrated"),
    Row(
        "softened_reverse_kl", "(1 + r) ln((1 + r)/r) - (1 + r) ln 2", "2/(1 + r)", "(1 + 2 r)/(1 + r)^2",
        "2 r^2/(1 + r)^3", "f_distill(softened_reverse_kl), integrated",
    ),
)  # fmt: skip

EQUAL = (
    ("f_distill(reverse_kl)", "diff_instruct", "no ratio is left: h = 1"),
    ("dmd2 without its critic", "diff_instruct(weight = dmd)", ""),
    ("dmd with regression = 0", "diff_instruct(weight = dmd)", ""),
    ("sid with both estimates detached", "diff_instruct, for every alpha", ""),
    ("sida with adversarial.weight = 0", "sid", ""),
    ("sim(distance = squared)", "2 sid(alpha = 1)", ""),
    ("sds", "diff_instruct of a single point", "the exact fake score is D_fake = x"),
    ("sid with game.calls = 1, guidance 1", "sid", "few-step and guided forms contain the plain one"),
    ("integral KL", "uni_instruct(reverse_kl) over levels", "weight W(sigma) = int_0^sigma w"),
)


def table() -> list[str]:
    """The table as lines of text."""
    head = Row("divergence", "f(r)", "score 2h", "path h - r h'", "pull r^2 h''", "recovers")
    cells = [head, *ROWS]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    lines = ["Uni-Instruct: grad E_p[h(r) |D_fake - D_real|^2] in three terms, r = q/p, h = r^2 f''(r)", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines += ["", "Special cases, each proved by a test:", ""]
    lines += [f"  {left} = {right}{f'  ({why})' if why else ''}" for left, right, why in EQUAL]
    return lines

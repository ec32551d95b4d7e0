"""Seeds as pure functions of what they are for.

Nothing here touches a global generator: a stream is keyed by a hash, so that a resumed run draws what the whole run
would have drawn, and no state of any generator needs to be stored.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a tuple of integers and names; equal on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(*key: int | str) -> torch.Generator:
    """A fresh CPU generator keyed by `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


def reseed(*key: int | str) -> None:
    """Set the global generators by `key`.

    `torch.manual_seed` also notes, with the whole call stack, what devices that were never used would have to do.
    """
    torch.default_generator.manual_seed(seed_of(*key))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed_of(*key))

"""Pickles read as inert data.

A pickle is a program for a small stack machine that imports names and calls them: whoever unpickles a file runs it.
The machine here knows the instructions that files of weights consist of and no others. It imports nothing and calls
nothing: a name in a file is looked up in `NAMES`, and what is not there ends the reading. Objects become plain values,
or an `Instance` that only holds their attributes; source code that a file carries is hashed and forgotten.

Reading costs at most `STEPS` instructions and text of twice the file's size, whatever the file asks for: containers are
never copied, compared or hashed as a whole, and tensors stay ranges of the file until someone asks for their values.

Instructions: `pickletools` in Python's library. Containers: `torch.save`, both the zip archive and the older stream, of
which a pickled storage is a whole one.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

STEPS = 400_000  # a network of 600 tensors takes 60,000
ENTRIES = 10_000  # of a zip archive


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A name of `NAMES`: what may be built under it, and for storages their type."""

    kind: str
    dtype: torch.dtype | None = None


NAMES = {
    "torch_utils.persistence._reconstruct_persistent_obj": Name("persistent"),
    "torch.nn.modules.container.ModuleDict": Name("module"),
    "collections.OrderedDict": Name("dict"),
    "dnnlib.util.EasyDict": Name("dict"),
    "builtins.set": Name("set"),
    "__builtin__.set": Name("set"),
    "_codecs.encode": Name("bytes"),
    "numpy.dtype": Name("dtype"),
    "numpy.core.multiarray.scalar": Name("scalar"),
    "numpy._core.multiarray.scalar": Name("scalar"),
    "torch._utils._rebuild_parameter": Name("parameter"),
    "torch._utils._rebuild_tensor_v2": Name("tensor"),
    "torch.storage._load_from_bytes": Name("storage"),
    "torch.FloatStorage": Name("type", torch.float32),
    "torch.DoubleStorage": Name("type", torch.float64),
    "torch.HalfStorage": Name("type", torch.float16),
    "torch.BFloat16Storage": Name("type", torch.bfloat16),
    "torch.LongStorage": Name("type", torch.int64),
}

SCALARS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}


@dataclass(eq=False, slots=True)
class Storage:
    """Numbers of one type: a range of the file."""

    dtype: torch.dtype
    count: int
    data: memoryview | None = None  # older streams hold it behind the pickle that refers to it


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """A tensor: a range of a storage, without gaps, whose bounds have been checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def tensor(self) -> Tensor:
        """The values, to be read only: they lie in the file's own pages, so that large files are held once."""
        dtype, data = self.storage.dtype, self.storage.data
        if self.count == 0:
            return torch.zeros(self.shape, dtype=dtype)
        assert data is not None
        raw = np.frombuffer(data, np.uint8, self.count * dtype.itemsize, self.offset * dtype.itemsize)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it must not be written to
            return torch.from_numpy(raw).view(dtype).as_strided(self.shape, self.stride).contiguous()


@dataclass(eq=False, slots=True)
class Instance:
    """An object of a class that is only a name here, with its attributes."""

    name: str
    state: Any = None


@dataclass(eq=False, slots=True)
class ScalarType:
    """A numpy type by its code, e.g. f8."""

    code: str


@dataclass(eq=False)
class Budget:
    """What is left of the work that one file may cause, and the SHA-256 of each source text met on the way."""

    text: int
    steps: int = STEPS
    sources: dict[str, str] = field(default_factory=dict)

    def spend(self, count: int) -> None:
        """Account for `count` bytes of text to be decoded."""
        self.text -= count
        if self.text < 0:
            raise ValueError("decodes to more text than the file holds")


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        value: dictionaries, lists, numbers, text, `Instance`s and `View`s.
        container: "pickle", "torch stream" or "torch zip".
        sources: SHA-256 of the source texts that it carries, in the order met.
    """

    value: Any
    container: str
    sources: tuple[str, ...]
    data: memoryview

    def sha256(self) -> str:
        """SHA-256 of the bytes that were read, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


def read(path: Path) -> Content:
    """Read a pickle or a file of `torch.save`.

    Raises:
        ValueError: naming the file and what is wrong or not known.
    """
    try:
        with open_regular(path) as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            budget = Budget(2 * len(data) + 2**20)
            if data[:4] == b"PK\x03\x04":
                value, container = _read_zip(file, data, budget), "torch zip"
            elif data[:4] == b"\x80\x02\x8a\x0a":  # the long integer that torch begins its streams with
                value, container = _read_stream(data, budget, nested=False), "torch stream"
            elif data[:1] == b"\x80":
                machine = Machine(data, 0, budget)
                value, container = machine.run(), "pickle"
                if machine.at != len(data):
                    raise ValueError(f"has {len(data) - machine.at} bytes behind its end")
            else:
                raise ValueError("neither a pickle (protocol 2 to 5) nor a file of torch.save")
            return Content(value, container, tuple(budget.sources.values()), data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file that is not empty for reading; pipes, devices and folders are refused unread.

    Raises:
        ValueError: saying what it is instead; the caller names the file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size == 0:
        os.close(handle)
        raise ValueError("empty" if stat.S_ISREG(facts.st_mode) else "not a regular file")
    return os.fdopen(handle, "rb")


# The machine ----------------------------------------------------------------------------------------------------------

Load = Callable[[str, torch.dtype, int], Storage]


class Machine:
    """The stack machine on one pickle.

    Args:
        data: the file, or the part of it that holds the pickle.
        at: where the pickle begins; after `run`, where it ended.
        load: finds the storage of (key, type, number of values) for persistent references; None refuses them.
        nested: within a storage no further stream may begin.
    """

    def __init__(
        self, data: memoryview, at: int, budget: Budget, load: Load | None = None, nested: bool = False
    ) -> None:
        self.data, self.at, self.budget, self.load, self.nested = data, at, budget, load, nested
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value that the pickle describes."""
        while True:
            self.budget.steps -= 1
            if self.budget.steps < 0:
                raise ValueError(f"takes more than {STEPS:,} instructions to read")
            code = self.take(1)[0]
            if code == STOP:
                if self.marks or len(self.stack) != 1:
                    raise ValueError("ends with an unbalanced stack")
                return self.stack.pop()
            if code not in INSTRUCTIONS:
                raise ValueError(f"contains the pickle instruction {bytes([code])!r}, which files of weights never do")
            INSTRUCTIONS[code](self)

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > len(self.data) - self.at:
            raise ValueError("is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        """The next unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the top of the stack, above the last mark."""
        self.top()
        return self.stack.pop()

    def top(self) -> Any:
        """The top of the stack, above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("takes from an empty stack")
        return self.stack[-1]

    def above_mark(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        if not self.marks:
            raise ValueError("asks for a mark that it did not set")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def text(self, size: int) -> str:
        """The next `size` bytes as text."""
        raw = self.take(size)
        # one character beyond Latin-1 makes Python store all of them in up to four bytes each
        wide = size > 0 and int(np.frombuffer(raw, np.uint8).max()) > 0xC3
        self.budget.spend(4 * size if wide else size)
        return str(raw, "utf-8")

    def line(self) -> str:
        """The next line, of a name."""
        raw = bytes(self.data[self.at : self.at + 200])
        end = raw.find(b"\n")
        if end < 0:
            raise ValueError("contains a name without end")
        self.at += end + 1
        return raw[:end].decode()


def _key(value: Any) -> str | int:
    """A dictionary's key or set's element. Text and small integers cannot be made to collide or nest."""
    if type(value) is str or (type(value) is int and 0 <= value < 2**32):
        return value
    raise ValueError(f"uses a key of type {type(value).__name__}")


def _proto(m: Machine) -> None:
    version = m.number(1)
    if not 2 <= version <= 5:
        raise ValueError(f"is a pickle of protocol {version}, expected 2 to 5")


def _frame(m: Machine) -> None:
    if m.number(8) > len(m.data) - m.at:
        raise ValueError("is cut short")


def _bytes(m: Machine, size: int) -> None:
    m.push(m.take(size))


def _long(m: Machine) -> None:
    size = m.number(1)
    if size > 16:
        raise ValueError(f"contains an integer of {size} bytes")
    m.push(int.from_bytes(m.take(size), "little", signed=True))


def _tuple(m: Machine, size: int) -> None:
    m.push(tuple(reversed([m.pop() for _ in range(size)])))


def _append(m: Machine, values: list[Any]) -> None:
    target = m.top()
    if type(target) is not list:
        raise ValueError(f"appends to a {type(target).__name__}")
    target.extend(values)


def _set_items(m: Machine, values: list[Any]) -> None:
    target = m.top()
    if type(target) is not dict or len(values) % 2:
        raise ValueError(f"sets items of a {type(target).__name__}")
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[_key(key)] = value


def _add_items(m: Machine) -> None:
    values, target = m.above_mark(), m.top()
    if type(target) is not set:
        raise ValueError(f"adds to a {type(target).__name__}")
    target.update(map(_key, values))


def _put(m: Machine, index: int) -> None:
    m.memo[index] = m.top()


def _get(m: Machine, index: int) -> None:
    if index not in m.memo:
        raise ValueError("refers to a value that it did not keep")
    m.push(m.memo[index])


def _name(m: Machine, module: Any, name: Any) -> None:
    path = f"{module}.{name}" if type(module) is str and type(name) is str else "?"
    if path not in NAMES:
        raise ValueError(f"names {path[:80]!r}, which files of weights do not need; nothing of it was run")
    m.push(NAMES[path])


def _name_from_stack(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    _name(m, module, name)


def _reduce(m: Machine) -> None:
    arguments, name = m.pop(), m.pop()
    if type(name) is not Name or name.kind not in MAKERS or type(arguments) is not tuple:
        raise ValueError("calls something that is not a known name")
    try:
        m.push(MAKERS[name.kind](m, *arguments))
    except TypeError:
        raise ValueError(f"makes a {name.kind} from {len(arguments)} arguments") from None


def _new_object(m: Machine) -> None:
    arguments, name = m.pop(), m.pop()
    if type(name) is not Name or name.kind not in ("module", "dict") or arguments != ():
        raise ValueError("makes an object of something that is not a known class")
    m.push({} if name.kind == "dict" else Instance("ModuleDict"))


def _build(m: Machine) -> None:
    state, target = m.pop(), m.top()
    match target:
        case Instance(name="ModuleDict", state=None) if type(state) is dict:
            target.state = state
        case ScalarType() if type(state) is tuple and len(state) > 1 and state[1] in ("<", "|"):
            pass  # little-endian, as SCALARS reads it
        case dict() if type(state) is dict:
            pass  # attributes of an ordered dictionary: torch keeps the versions of modules there
        case _:
            raise ValueError("gives attributes to something that takes none, or none of this kind")


def _persistent_reference(m: Machine) -> None:
    reference = m.pop()
    match reference:
        case ("storage", Name(kind="type", dtype=dtype), str(key), str(), int(count), *rest) if rest in ([], [None]):
            if m.load is None or dtype is None or not 0 <= count < 2**48:
                raise ValueError("refers to data outside itself")
            m.push(m.load(key, dtype, count))
        case _:
            raise ValueError("refers to data outside itself")


STOP = ord(".")
INSTRUCTIONS: dict[int, Callable[[Machine], None]] = {
    0x80: _proto,
    0x95: _frame,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    0x8A: _long,
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    0x8C: lambda m: m.push(m.text(m.number(1))),
    ord("X"): lambda m: m.push(m.text(m.number(4))),
    0x8D: lambda m: m.push(m.text(m.number(8))),
    ord("C"): lambda m: _bytes(m, m.number(1)),
    ord("B"): lambda m: _bytes(m, m.number(4)),
    0x8E: lambda m: _bytes(m, m.number(8)),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    0x8F: lambda m: m.push(set()),
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: _tuple(m, 1),
    0x86: lambda m: _tuple(m, 2),
    0x87: lambda m: _tuple(m, 3),
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("t"): lambda m: m.push(tuple(m.above_mark())),
    ord("a"): lambda m: _append(m, [m.pop()]),
    ord("e"): lambda m: _append(m, m.above_mark()),
    ord("s"): lambda m: _set_items(m, [m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: _set_items(m, m.above_mark()),
    0x90: _add_items,
    ord("q"): lambda m: _put(m, m.number(1)),
    ord("r"): lambda m: _put(m, m.number(4)),
    0x94: lambda m: _put(m, len(m.memo)),
    ord("h"): lambda m: _get(m, m.number(1)),
    ord("j"): lambda m: _get(m, m.number(4)),
    ord("c"): lambda m: _name(m, m.line(), m.line()),
    0x93: _name_from_stack,
    ord("R"): _reduce,
    0x81: _new_object,
    ord("b"): _build,
    ord("Q"): _persistent_reference,
}


# What the names stand for ---------------------------------------------------------------------------------------------


def _make_dict(m: Machine) -> dict[Any, Any]:
    return {}


def _make_set(m: Machine, values: Any) -> set[Any]:
    if type(values) is not list:
        raise ValueError("makes a set of something that is not a list")
    m.budget.steps -= len(values)  # the same list may come many times
    return set(map(_key, values))


def _make_bytes(m: Machine, text: Any, encoding: Any) -> memoryview:
    if type(text) is not str or encoding != "latin1":
        raise ValueError("encodes something that is not text in Latin-1")
    m.budget.spend(len(text))
    return memoryview(text.encode("latin-1"))


def _make_dtype(m: Machine, code: Any, align: Any, copy: Any) -> ScalarType:
    if type(code) is not str or code not in SCALARS:
        raise ValueError("contains a numpy value that is not a plain number")
    return ScalarType(code)


def _make_scalar(m: Machine, dtype: Any, raw: Any) -> Any:
    if type(dtype) is not ScalarType or type(raw) is not memoryview:
        raise ValueError("contains a numpy value that is not a plain number")
    form = SCALARS[dtype.code]
    if len(raw) != struct.calcsize(form):
        raise ValueError("contains a numpy value of the wrong size")
    return struct.unpack(form, raw)[0]


def _make_persistent(m: Machine, meta: Any) -> Instance:
    if type(meta) is not dict or not {"type", "module_src", "class_name", "state"} <= meta.keys():
        raise ValueError("contains an incomplete persistent object")
    source, name = meta["module_src"], meta["class_name"]
    if meta["type"] != "class" or type(source) is not str or type(name) is not str:
        raise ValueError("contains a persistent object that is not of a class")
    if source not in m.budget.sources:
        m.budget.spend(len(source))
        m.budget.sources[source] = hashlib.sha256(source.encode()).hexdigest()
    return Instance(name, meta["state"])


def _make_storage(m: Machine, raw: Any) -> Storage:
    if m.nested or type(raw) is not memoryview:
        raise ValueError("contains a storage that is not a stream of bytes")
    value = _read_stream(raw, m.budget, nested=True)
    if type(value) is not Storage:
        raise ValueError("contains a storage that holds something else")
    return value


def _make_tensor(
    m: Machine, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> View:
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("contains a tensor that is not in a storage")
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError("contains a tensor of impossible shape")
    view = View(storage, offset, shape, stride)
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if view.count > 0 and reach != view.count:
        raise ValueError("contains a tensor with gaps or repetitions")
    if offset + view.count > storage.count:
        raise ValueError("contains a tensor that reaches beyond its storage")
    return view


def _make_parameter(m: Machine, view: Any, grad: Any, hooks: Any) -> View:
    if type(view) is not View:
        raise ValueError("contains a parameter that is not a tensor")
    return view


MAKERS: dict[str, Callable[..., Any]] = {
    "persistent": _make_persistent,
    "dict": _make_dict,
    "set": _make_set,
    "bytes": _make_bytes,
    "dtype": _make_dtype,
    "scalar": _make_scalar,
    "parameter": _make_parameter,
    "tensor": _make_tensor,
    "storage": _make_storage,
}


# Files of torch.save --------------------------------------------------------------------------------------------------

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


def _read_stream(data: memoryview, budget: Budget, nested: bool) -> Any:
    """torch's older form: the magic number, a version, facts on the machine, the object, keys; then the storages."""
    storages: dict[str, Storage] = {}

    def load(key: str, dtype: torch.dtype, count: int) -> Storage:
        known = storages.setdefault(key, Storage(dtype, count))
        if known.dtype != dtype or known.count != count:
            raise ValueError("refers to one storage in two ways")
        return known

    at = 0

    def pickled(load: Load | None = None) -> Any:
        nonlocal at
        machine = Machine(data, at, budget, load, nested)
        value = machine.run()
        at = machine.at
        return value

    if pickled() != MAGIC or pickled() != VERSION:
        raise ValueError("contains a stream that is not of torch.save")
    system = pickled()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("contains numbers that are not little-endian")
    value = pickled(load)
    keys = pickled()
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("does not list the storages that it holds")
    for key in keys:
        storage = storages[key]
        size = storage.count * storage.dtype.itemsize
        if data[at : at + 8] != storage.count.to_bytes(8, "little") or len(data) - at - 8 < size:
            raise ValueError("is cut short or of another size than it says")
        storage.data = data[at + 8 : at + 8 + size]
        at += 8 + size
    if at != len(data):
        raise ValueError(f"has {len(data) - at} bytes behind its end")
    return value


def _read_zip(file: BinaryIO, data: memoryview, budget: Budget) -> Any:
    """torch's newer form: an archive, not compressed, of data.pkl and one entry for each storage."""
    mapped, found, at = data.obj, 0, 0
    assert isinstance(mapped, mmap.mmap)
    while (at := mapped.find(b"PK\x01\x02", at) + 1) > 0:  # zipfile reads the whole directory before it can be asked
        found += 1
        if found > ENTRIES:
            raise ValueError(f"is an archive of more than {ENTRIES:,} entries")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError, OSError) as error:
        raise ValueError(f"is a damaged archive ({error})") from None
    if sum(entry.file_size for entry in entries.values()) > len(data):
        raise ValueError("is an archive of entries that overlap or are compressed; torch.save stores plainly")
    if any(name.endswith("/constants.pkl") for name in entries):
        raise ValueError("is a TorchScript program, not a file of weights")
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("is an archive that torch.save did not write: it has not one data.pkl")

    def entry(name: str) -> memoryview:
        facts = entries.get(roots[0] + name)
        if facts is None:
            raise ValueError(f"lacks its entry {name[:80]!r}")
        if facts.compress_type != zipfile.ZIP_STORED or facts.flag_bits & 1 or facts.file_size != facts.compress_size:
            raise ValueError("is a compressed or encrypted archive; torch.save stores plainly")
        header = data[facts.header_offset : facts.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError("is a damaged archive (an entry is not where it should be)")
        start = facts.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        content = data[start : start + facts.file_size]
        if len(content) != facts.file_size or zlib.crc32(content) != facts.CRC:
            raise ValueError(f"is damaged: the checksum of {name[:80]!r} does not match")
        return content

    if roots[0] + "byteorder" in entries and entry("byteorder") != b"little":
        raise ValueError("contains numbers that are not little-endian")
    storages: dict[str, Storage] = {}

    def load(key: str, dtype: torch.dtype, count: int) -> Storage:
        if key not in storages:
            storages[key] = Storage(dtype, count, entry(f"data/{key}"))
        known = storages[key]
        assert known.data is not None
        if (known.dtype, known.count) != (dtype, count) or len(known.data) != count * dtype.itemsize:
            raise ValueError(f"is damaged: storage {key[:80]!r} has another size than it says")
        return known

    machine = Machine(entry("data.pkl"), 0, budget, load)
    value = machine.run()
    if machine.at != len(machine.data):
        raise ValueError("is damaged: data.pkl goes on behind its end")
    return value

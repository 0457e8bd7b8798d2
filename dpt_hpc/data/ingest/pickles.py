"""The published MPF.2021.2.8 pickles, read without running a line of the code that they may carry.

A pickle is a program that may call any function. Here only containers are made for real; pymatgen's classes are
replaced by passive records that merely keep their state (so the pymatgen that wrote the file need not be the one that
is installed), numpy's arrays by tables of plain numbers (numpy's own loader believes a pickle that calls bytes
pointers), and every other name is refused.
"""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.ingest.json_readers import elements
from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.record import Broken, Record, RecordError, flags, numeric, scalar
from dpt_hpc.errors import DataError

PYMATGEN = {
    "pymatgen.core.structure": ("Structure", "IStructure"),
    "pymatgen.core.sites": ("PeriodicSite",),
    "pymatgen.core.lattice": ("Lattice",),
    "pymatgen.core.composition": ("Composition",),
    "pymatgen.core.periodic_table": ("Element", "Species", "Specie"),
}
"""Made as `Passive` records."""
MADE = {
    "builtins": ("list", "dict", "tuple", "set", "frozenset", "object"),
    "collections": ("OrderedDict", "defaultdict"),
}
"""Made for real: containers, none of which runs anything."""
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Names of Python 2, which Python 3 writes in pickles of protocol 0 to 2."""
COLUMNS = ("structure", "energy", "force", "stress", "id")


class Passive:
    """Stands for an object of another package: its arguments and its state, no behaviour."""

    arguments: tuple[Any, ...]
    state: Mapping[str, Any]

    def __new__(cls, *arguments: Any) -> Passive:
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = {}
        return made

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)  # of __dict__, and of __slots__
        self.state = {k: v for part in parts if isinstance(part, Mapping) for k, v in part.items()}


class Refused(Exception):
    """The pickle asks for a name that is not on the list."""


class _Sealed:
    """A function that a pickle may call; it cannot change it, as it could a plain function's attributes."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise Refused("the state of a function")


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in pickles of protocol 2 are Latin-1 text; no other codec is looked up."""
    if encoding != "latin1":
        raise Refused(f"_codecs.encode with {encoding!r}")
    return text.encode("latin-1")


def _reconstructor(kind: Any, base: Any, state: Any) -> Passive:
    """Plain objects in pickles of protocol 0 and 1."""
    if kind is not Passive or base is not object:
        raise Refused(f"copyreg._reconstructor of {kind!r}")
    return Passive()


NUMBERS = re.compile(r"[<>|=]?([biu][1248]|f[248])")


class Kind:
    """Stands for a numpy.dtype: numbers of one size, in one byte order."""

    def __init__(self, code: str, *copied: Any) -> None:
        if not (isinstance(code, str) and NUMBERS.fullmatch(code)):
            raise Refused(f"an array of {code!r:.40}")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "=")):
            raise Refused(f"an array of {self.code} in the byte order {state!r:.40}")
        self.code = state[1] + self.code.lstrip("<>|=")


class Table:
    """Stands for a numpy.ndarray: `_reconstruct` makes it, and its state fills it."""

    def __init__(self, *empty: Any) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, content = state
        self.values = _numbers(content, kind, shape, "F" if by_columns else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: int) -> Any:
        return self.values[place]


def _numbers(content: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(kind, Kind) or not isinstance(content, (bytes, bytearray)):
        raise Refused(f"an array of {type(content).__name__}")
    return np.frombuffer(content, dtype=kind.code).reshape(shape, order=order)


def _frombuffer(buffer: Any, kind: Any, shape: Any, order: Any) -> Table:
    """Arrays in pickles of protocol 5."""
    table = Table()
    table.values = _numbers(buffer, kind, shape, order)
    return table


def _scalar(kind: Any, content: Any) -> Any:
    return _numbers(content, kind, (1,), "C")[0].item()


SEALED = {
    ("numpy", "ndarray"): Table,
    ("numpy", "dtype"): Kind,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Sealed(Table) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Sealed(_scalar) for core in ("core", "_core")},
    ("_codecs", "encode"): _Sealed(_encode),
    ("copyreg", "_reconstructor"): _Sealed(_reconstructor),
    ("numpy.core.numeric", "_frombuffer"): _Sealed(_frombuffer),
    ("numpy._core.numeric", "_frombuffer"): _Sealed(_frombuffer),
}
"""Functions and classes of the standard library and of numpy, done by ours."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = RENAMED.get(module, module)
        if name in PYMATGEN.get(module, ()):
            return Passive
        if name in MADE.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if (module, name) in SEALED:
            return SEALED[module, name]
        raise Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise Refused(f"persistent object {pid!r}")


def read_mpf_pickle(path: Path, options: IngestOptions) -> Iterator[Record | Broken]:
    """{material: {structure: [..], energy: [..] total eV, force: [..], stress: [..], id: [..]}}, the file in memory.

    Raises DataError, naming the class, if the file asks for anything but containers, numpy arrays and pymatgen's
    structures.
    """
    try:
        with path.open("rb") as stream:
            materials = _Unpickler(stream).load()
    except Refused as error:
        raise DataError(
            f"{path}: the pickle asks for {error}, which the MPF format does not need; nothing of it was run.\n"
            "A pickle can run any program: do not trust this file. Convert other data to extended XYZ or JSON."
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        yield Broken("the file", f"is no whole pickle: {type(error).__name__}: {error}", rest_lost=True)
        return
    if not isinstance(materials, dict):
        yield Broken("the file", f"holds {type(materials).__name__}, expected a dict of materials", rest_lost=True)
        return
    for material, columns in materials.items():
        yield from _frames(str(material), columns)


def _frames(material: str, columns: Any) -> Iterator[Record | Broken]:
    missing = [c for c in COLUMNS[:1] if not isinstance(columns, Mapping) or c not in columns]
    if missing:
        yield Broken(material, f"has no {missing[0]}")
        return
    lengths = {c: len(columns[c]) for c in COLUMNS if columns.get(c) is not None}
    if len(set(lengths.values())) != 1:
        yield Broken(material, f"its columns differ in length: {lengths}")
        return
    for i in range(lengths["structure"]):
        entry = {c: columns[c][i] for c in lengths}
        name = f"{material}/{entry.get('id', i)}"
        try:
            yield _record(name, entry)
        except RecordError as error:
            yield Broken(name, str(error))
        except (AttributeError, ArithmeticError, TypeError, ValueError, LookupError) as error:
            yield Broken(name, f"is not of this format: {type(error).__name__}: {error}")


def _record(name: str, entry: Mapping[str, Any]) -> Record:
    structure = entry["structure"].state
    lattice = structure["_lattice"].state
    cell = numeric(lattice["_matrix"], "lattice", (3, 3))
    symbols: list[str] = []
    for site in structure["_sites"]:
        species = site.state["_species"].state["_data"]
        ((kind, amount),) = species.items() if len(species) == 1 else ((None, 0),)
        if kind is None or not abs(amount - 1) <= 1e-6:
            raise RecordError(f"site {len(symbols)} is disordered (partial occupancy)")
        element = kind.state.get("_el", kind)  # Species wraps Element
        symbols.append(element.arguments[0])
    fractional = numeric([site.state["_frac_coords"] for site in structure["_sites"]], "coordinates", (-1, 3))
    energy, force, stress = (entry.get(c) for c in ("energy", "force", "stress"))
    return Record(
        name,
        elements(symbols),
        fractional @ cell,
        cell,
        flags(lattice.get("_pbc", (True, True, True)), "pbc"),
        energy=None if energy is None else scalar(energy, "energy"),
        forces=None if force is None else numeric(force, "force", (-1, 3)),
        stress=None if stress is None else numeric(stress, "stress"),
        structure_id=name,
    )

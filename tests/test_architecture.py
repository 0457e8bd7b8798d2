"""The house rules that a machine can check: layers, doors, sizes, names, documented functions.

A layer may import only what its line in LAYERS lists; a heavy dependency may be imported only behind its door. Imports
inside functions and under TYPE_CHECKING count too: late is not elsewhere.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpt_hpc"

BASE = {"errors", "structure", "stopwatch", "plain_text"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "structure": {"errors"},
    "stopwatch": set(),
    "plain_text": set(),
    "network_options": set(),
    "ops": BASE | {"network_options"},
    "data": BASE,
    "models": BASE | {"ops", "network_options"},
    "train": BASE | {"ops", "data", "models", "network_options"},
    "use": BASE | {"ops", "data", "models", "train"},
    "calculator": BASE | {"use"},
    "scaling": BASE | {"ops", "data", "models", "train"},
    "doctor": BASE | {"ops", "data", "models", "train"},
    "report": BASE,
    "watch": BASE | {"report", "train"},
    "suite": BASE | {"data", "models", "train", "report"},
    "quickstart": BASE | {"data", "train", "report"},
    "cli": BASE | {"use", "data", "train", "report", "quickstart", "suite", "scaling", "doctor", "watch"},
    "__main__": {"cli"},
    "launch": {"cli"},
}
"""What each room of dpt_hpc may import from the others."""

DOORS: dict[str, tuple[str, ...]] = {
    "ase": ("data/ingest/", "calculator.py"),  # the calculator is a class of ASE's
    "pymatgen": ("data/ingest/",),
    "pooch": ("data/catalog/download.py",),
    "requests": ("data/catalog/download.py",),
    "h5py": ("data/shard_file.py",),
    "deepspeed": ("train/engine.py",),
    "mpi4py": ("train/world.py", "train/one_sided.py", "data/store_cluster.py"),
    "matplotlib": ("report/",),
    "tensorboard": ("train/",),
    "typer": ("cli/",),
    "torch_scatter": ("ops/pyg.py",),
    "torch_cluster": ("ops/pyg.py",),
    "dpt_hpc._C": ("ops/",),
}
"""The files, or folders, that may import each heavy dependency."""

ATTICS = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_LINES = 400


def sources(*suffixes: str) -> list[Path]:
    """The project's own source files with these suffixes, wherever they are."""
    rooms = [ROOT / name for name in ("dpt_hpc", "csrc", "tests", "benchmarks")]
    return sorted(p for room in rooms for p in room.rglob("*") if p.suffix in suffixes)


def imported_modules(source: str, package: str = "") -> Iterator[str]:
    """Dotted names that `source` imports; `package` resolves relative ones. `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def broken_rules(path: str, source: str) -> list[str]:
    """Layers crossed and doors opened by the file at `path` (relative to dpt_hpc)."""
    room = path.partition("/")[0].removesuffix(".py")
    package = ".".join(["dpt_hpc", *path.split("/")[:-1]])
    found = []
    for module in sorted(set(imported_modules(source, package))):
        for dependency, doors in DOORS.items():
            if (module == dependency or module.startswith(dependency + ".")) and not path.startswith(doors or ("-",)):
                found.append(f"{path} imports {module}, whose door is {' or '.join(doors) or 'closed'}")
        parts = module.split(".")
        if parts[0] == "dpt_hpc" and len(parts) > 1 and room != "__init__":
            other = parts[1]
            if other in LAYERS and other != room and other not in LAYERS[room]:
                found.append(f"{path} imports dpt_hpc.{other}, but {room} may import {sorted(LAYERS[room])} only")
    return found


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_place_in_the_layers() -> None:
    rooms = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in package_files()} - {"__init__"}
    assert rooms <= set(LAYERS), f"give {rooms - set(LAYERS)} a line in LAYERS"


def test_imports_follow_the_layers_and_the_doors() -> None:
    found = [
        rule
        for path in package_files()
        for rule in broken_rules(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/split.py", "import ase.io"),
        ("data/split.py", "from dpt_hpc.ops import radius_graph"),
        ("data/split.py", "from ..models import cgcnn"),
        ("data/split.py", "from .. import models"),
        ("models/cgcnn.py", "import dpt_hpc._C"),
        ("models/cgcnn.py", "from dpt_hpc import _C"),
        ("train/loop.py", "def late():\n    import deepspeed.comm as dist"),
        ("train/loop.py", "import importlib\nimportlib.import_module('mpi4py')"),
        ("report/page.py", "if TYPE_CHECKING:\n    from dpt_hpc.train.config import PretrainConfig"),
        ("ops/graph.py", "import torch_cluster"),
        ("structure.py", "from dpt_hpc.data.shards import Dataset"),
    ],
)
def test_a_crossed_layer_or_a_new_door_is_found(path: str, source: str) -> None:
    assert broken_rules(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/ingest/readers.py", "import ase.io"),
        ("data/shard_file.py", "import h5py\nfrom dpt_hpc.structure import Batch"),
        ("ops/graph.py", "from dpt_hpc import _C"),
        ("train/engine.py", "def start():\n    import deepspeed"),
        ("models/cgcnn.py", "import torch\nfrom .radial import gaussian_basis\nfrom ..ops import cgconv"),
    ],
)
def test_a_lawful_import_passes(path: str, source: str) -> None:
    assert not broken_rules(path, source)


LIGHT = """
import importlib, importlib.abc, sys
blocked = {blocked!r}
class Closed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(name + " is behind a door")
sys.meta_path.insert(0, Closed())
for name in {modules!r}:
    importlib.import_module(name)
"""


def test_kernels_models_and_a_single_process_run_need_only_torch_numpy_and_h5py() -> None:
    """Imports them with the heavy dependencies made unimportable."""
    blocked = [
        "ase",
        "pymatgen",
        "pooch",
        "deepspeed",
        "mpi4py",
        "matplotlib",
        "typer",
        "torch_scatter",
        "torch_cluster",
    ]
    rooms = ["structure", "ops", "models", "data", "train"]
    modules = [f"dpt_hpc.{room}" for room in rooms]
    modules += [f"dpt_hpc.train.{path.stem}" for path in sorted((PACKAGE / "train").glob("[!_]*.py"))]
    program = LIGHT.format(blocked=blocked, modules=modules)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_and_models_need_only_torch_and_numpy() -> None:
    """What benchmarks/gpu.sh relies on: a GPU machine may have nothing else."""
    blocked = ["ase", "pymatgen", "h5py", "deepspeed", "mpi4py", "pydantic", "yaml", "matplotlib", "tensorboard"]
    blocked += ["typer", "rich", "jinja2", "safetensors", "torch_scatter", "torch_cluster"]
    program = LIGHT.format(blocked=blocked, modules=["dpt_hpc.structure", "dpt_hpc.ops", "dpt_hpc.models"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_source_file_is_too_long() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in sources(".py", ".pyi", ".cpp", ".cu", ".h")}
    long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, is each still one idea? {long}"


def test_no_module_is_an_attic() -> None:
    paths = [p.relative_to(ROOT) for p in sources(".py", ".cpp", ".cu", ".h")]
    attics = [str(p) for p in paths if ATTICS & {part.partition(".")[0] for part in p.parts}]
    assert not attics


def public_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Module-level public functions of the package, each with its place."""
    for path in package_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_public_functions_are_documented() -> None:
    bare = [place for place, node in public_functions() if not ast.get_docstring(node)]
    assert not bare, "no docstring:\n" + "\n".join(bare)


def test_public_functions_use_the_names_of_the_field() -> None:
    """`shifts` is Cartesian in one code and integer in another; a batch is never `data`."""
    vague = [
        f"{place}: {argument.arg}"
        for place, node in public_functions()
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if argument.arg == "shifts" or (argument.arg == "data" and "Batch" in ast.unparse(argument.annotation or node))
    ]
    assert not vague, "\n".join(vague)

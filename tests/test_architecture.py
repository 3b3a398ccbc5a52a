"""The house rules: which room imports what, what is loaded at import time, and that every node explains itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib

import diff2flow_nodes
from diff2flow_nodes import hosts

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "alignment": set(),
    "samplers": {"alignment"},
    "depth": {"alignment", "files"},
    "metrics": {"alignment", "files"},
    "training": {"samplers", "alignment", "depth", "files"},
    "hosts": {"samplers", "alignment", "training", "depth", "files"},
    "nodes": {"hosts", "training", "depth", "metrics", "samplers", "alignment", "files"},
}
HOST_ONLY = {"comfy": "hosts/comfy", "folder_paths": "hosts/comfy", "server": "hosts/comfy",
             "latent_preview": "hosts/comfy", "comfy_extras": "hosts/comfy", "comfy_execution": "hosts/comfy",
             "aiohttp": "hosts/comfy",
             "diffusers": "hosts/headless", "transformers": "hosts/headless"}  # fmt: skip
LAZY = ("peft", "diffusers", "transformers", "matplotlib", "torchdiffeq", "accelerate", "OpenEXR", "h5py",
        "torchmetrics", "torch_fidelity", "scipy")  # fmt: skip
LATE = ("training.adapters", "training.dataset", "training.encoding", "training.finetune", "training.loop",
        "training.metadata", "training.pairs", "training.plot", "training.product", "training.reflow",
        "training.settings", "depth.files", "depth.layouts", "metrics.evaluation")  # fmt: skip


def sources(room: str) -> Iterator[Path]:
    yield from sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import in a file; level 0 is absolute."""
    for statement in ast.walk(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            yield from ((0, alias.name) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            if statement.module:
                yield statement.level, statement.module
            else:
                yield from ((statement.level, alias.name) for alias in statement.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    for path in sources(room):
        depth = len(path.relative_to(ROOT).parts) - 1
        for level, module in imports(path):
            if level == 0:
                assert not module.startswith("diff2flow_nodes"), f"{path}: {module} must be imported relatively"
            elif level > depth:
                target = module.split(".")[0]
                assert target in ROOMS[room] | {room}, f"{path} imports {target}"


@pytest.mark.parametrize("path", [p for room in ROOMS for p in sources(room)], ids=lambda p: str(p.relative_to(ROOT)))
def test_hosts_keep_to_themselves(path: Path) -> None:
    inside = path.relative_to(ROOT).as_posix()
    for level, module in imports(path):
        home = HOST_ONLY.get(module.split(".")[0]) if level == 0 else None
        assert home is None or inside.startswith(home), f"{inside} imports {module}"


def test_pure_rooms_know_torch_alone() -> None:
    allowed = {"torch", "torchdiffeq", "numpy"} | sys.stdlib_module_names
    for room in ("alignment", "samplers"):
        for path in sources(room):
            for level, module in imports(path):
                assert level or module.split(".")[0] in allowed, f"{path} imports {module}"


WIDE_HOME = "alignment/precision.py"


@pytest.mark.parametrize("path", [p for room in ROOMS for p in sources(room)], ids=lambda p: str(p.relative_to(ROOT)))
def test_one_place_asks_for_float64(path: Path) -> None:
    """Some devices have none: what computes in it asks `alignment.precision`, which knows."""
    if path == ROOT / WIDE_HOME:
        return
    for found in ast.walk(ast.parse(path.read_text())):
        if isinstance(found, ast.Attribute):
            of_torch = isinstance(found.value, ast.Name) and found.value.id == "torch"
            asks = found.attr in ("double", "DoubleTensor") or (of_torch and found.attr in ("float64", "complex128"))
            assert not asks, f"{path}:{found.lineno}: {ast.unparse(found)}; see {WIDE_HOME}"
        if isinstance(found, ast.ImportFrom) and found.module == "torch":
            assert not {alias.name for alias in found.names} & {"double", "float64"}, f"{path}:{found.lineno}"


def test_heavy_libraries_are_loaded_when_used() -> None:
    code = f"import sys, diff2flow_nodes.nodes; print([m for m in {LAZY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_runs_is_loaded_when_a_node_runs() -> None:
    """Loading the nodes is part of ComfyUI's start."""
    for module in LATE:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{module} has another name now"
    late = [f"diff2flow_nodes.{module}" for module in LATE]
    code = f"import sys, diff2flow_nodes.nodes; print([m for m in {late!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    skipped = {".git", ".venv", ".cache", ".gpu", "tests", "build", "output"}
    packages = {
        ".".join(["diff2flow_nodes", *init.parent.relative_to(ROOT).parts])
        for init in ROOT.rglob("__init__.py")
        if not skipped & set(init.relative_to(ROOT).parts)
    }
    assert set(declared["packages"]) == set(declared["package-dir"]) == packages


CATEGORIES = {f"Diff2Flow/{menu}" for menu in ("loaders", "sampling", "evaluation", "depth", "training", "saving")}


class _Names:
    """A host that only lists files, for INPUT_TYPES."""

    def names(self, kind: str) -> list[str]:
        return [f"some_{kind}.safetensors"]


@pytest.fixture
def listed() -> Iterator[None]:
    before = list(hosts._chosen)
    hosts.use(_Names())
    yield
    hosts._chosen[:] = before


@pytest.mark.parametrize("name", sorted(diff2flow_nodes.NODE_CLASS_MAPPINGS))
def test_node_explains_itself(listed: None, name: str) -> None:
    node = diff2flow_nodes.NODE_CLASS_MAPPINGS[name]
    assert name in diff2flow_nodes.NODE_DISPLAY_NAME_MAPPINGS
    assert node.CATEGORY in CATEGORIES and len(node.DESCRIPTION) > 40 and callable(getattr(node, node.FUNCTION))
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES) and all(len(tip) > 10 for tip in node.OUTPUT_TOOLTIPS)
    for kind, group in node.INPUT_TYPES().items():
        for key, declaration in group.items() if kind != "hidden" else ():
            assert len(declaration) == 2 and len(declaration[1].get("tooltip", "")) > 10, f"{name}.{key} has no tooltip"


@pytest.mark.parametrize("name", sorted(diff2flow_nodes.NODE_CLASS_MAPPINGS))
def test_node_is_found_by_other_words(name: str) -> None:
    """SEARCH_ALIASES find a node in newer ComfyUI; 0.3.64 does not look at them."""
    aliases = diff2flow_nodes.NODE_CLASS_MAPPINGS[name].SEARCH_ALIASES
    shown = diff2flow_nodes.NODE_DISPLAY_NAME_MAPPINGS[name].lower()
    assert 2 <= len(aliases) == len({alias.lower() for alias in aliases})
    assert all(isinstance(alias, str) and alias.lower() not in shown for alias in aliases)

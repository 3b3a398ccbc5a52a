"""What is published: the registry's folder and the wheel hold all that is needed, and nothing that is not allowed."""

from __future__ import annotations

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import diff2flow_nodes

ROOT = Path(__file__).resolve().parent.parent
IGNORED = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
LEFT_OUT = {".git", ".venv", ".cache", ".gpu", "__pycache__", "models", "input", "output", "build", "dist"}
FORBIDDEN_CALLS, FORBIDDEN_MODULES = {"eval", "exec", "compile"}, {"subprocess", "pip", "pickle"}
if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
else:
    pytest.skip("tomllib is part of Python from 3.11 on", allow_module_level=True)


def _published() -> list[Path]:
    """Paths of what the registry gets, relative."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        relative = path.relative_to(ROOT)
        hidden = set(relative.parts) & LEFT_OUT or any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and not _is_ignored(relative):
            found.append(relative)
    return found


def _is_ignored(path: Path) -> bool:
    tops = [pattern.rstrip("/") for pattern in IGNORED]
    return path.parts[0] in tops or any(fnmatch.fnmatch(path.as_posix(), pattern) for pattern in tops)


def test_the_version_is_said_once():
    assert PROJECT["project"]["version"] == diff2flow_nodes.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", diff2flow_nodes.__version__)
    assert f"## {diff2flow_nodes.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_what_the_registry_asks_for_is_there():
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"]
    icon = ROOT / comfy["Icon"].partition("/main/")[2]
    assert icon.is_file() and icon.stat().st_size < 200_000
    assert "comfyui" not in PROJECT["project"]["name"].lower() and PROJECT["project"]["urls"]["Repository"]
    for name in PROJECT["project"]["license-files"]:
        assert (ROOT / name).is_file()


def test_requirements_and_dependencies_agree():
    """ComfyUI-Manager reads requirements.txt, the registry pyproject.toml; what ComfyUI brings is not asked for."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line for line in lines if line and not line.startswith("#")}
    brought = {"torch", "safetensors", "pillow", "numpy", "scipy", "psutil"}
    assert set(PROJECT["project"]["dependencies"]) - brought == wanted


def test_every_room_is_a_package():
    """A folder that is left out of the list is missing from the wheel."""
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("__init__.py")}
    rooms = {room for room in rooms if not set(Path(room).parts) & LEFT_OUT and not room.startswith("tests")}
    names = {"diff2flow_nodes" if room == "." else f"diff2flow_nodes.{room.replace('/', '.')}" for room in rooms}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("path", [path for path in _published() if path.suffix == ".py"], ids=str)
def test_nothing_is_executed_or_installed_at_run_time(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {module.partition(".")[0] for module in modules} & FORBIDDEN_MODULES, f"line {node.lineno}"


ALONE = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
runpy.run_module("diff2flow_nodes", run_name="__main__", alter_sys=True)
"""
"""The command without what an editable installation adds: its finder lends to any folder the rooms that it lacks."""


def test_the_published_folder_works_alone(tmp_path):
    """As ComfyUI-Manager leaves it in custom_nodes: the nodes are there; the measurements say where they are."""
    for path in _published():
        (tmp_path / "pack" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / "pack" / path)
    (tmp_path / "diff2flow_nodes").symlink_to(tmp_path / "pack", target_is_directory=True)

    def ran(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-P", "-c", ALONE, *words]
        environment = {"PYTHONPATH": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    assert not (tmp_path / "pack" / "bench").exists() and (tmp_path / "pack" / "web" / "docs").is_dir()
    listed = ran("nodes")
    assert listed.returncode == 0 and "Diff2FlowTrain" in listed.stdout.split()
    refused = ran("bench", "--quick")
    assert refused.returncode == 2 and refused.stderr.strip().splitlines()[-1].endswith("git checkout of this pack")


def test_the_wheel_has_everything(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT, "*.egg-info", ".*"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for folder in ("web", "locales", "example_workflows", "nodes", "bench/evidence/stages"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                assert f"diff2flow_nodes/{path.relative_to(ROOT).as_posix()}" in names
    assert not any(name.startswith("diff2flow_nodes/tests") for name in names)

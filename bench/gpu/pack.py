"""Prepares .gpu/: what has to travel, beside the repository, to a machine that has torch and reaches nothing.

    python -m diff2flow_nodes.bench.gpu.pack --comfyui path/to/ComfyUI

Wheels of what such a machine lacks are fetched by pip, for its python; of those with libraries for many GPUs, only what
one CUDA version needs is kept. ComfyUI comes without its pages, tests, history and the tokenizers of other models.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / ".gpu"
WHEELS = ("diffusers", "importlib_metadata", "lazy-importer", "open_clip_torch", "ftfy", "wcwidth", "torchdiffeq",
          "prodigyopt", "schedulefree", "OpenEXR")  # fmt: skip
"""Of the pack and its optional optimizers, in the versions of requirements.lock."""
COMFY_WHEELS = ("torchsde", "trampoline")
TRIMMED: Mapping[str, Callable[[str], bool]] = {
    "comfy-kitchen": lambda name: not name.endswith(".so"),
    "comfy-aimdo": lambda name: not name.endswith((".dll", "aimdo_rocm.so")),
    "bitsandbytes": lambda name: not name.endswith(".so") or name.endswith("_cuda130.so"),
}
"""Packages that are unpacked, and which of their files are kept. ComfyUI 0.33 imports comfy_kitchen, whose eager
backend needs no library; comfy_aimdo is its dynamic VRAM; 8-bit AdamW is for the CUDA that torch was built with."""
_LEFT_OUT = {".git", ".github", "web", "tests", "tests-unit", "models", "input", "output", "user", "blueprints",
             "comfy_api_nodes", "script_examples", "custom_nodes", "alembic_db", "openapi.yaml"}  # fmt: skip
"""Of a checkout's own folder; and anywhere in it:"""
_NOWHERE = ("__pycache__", "*.pyc", "*.safetensors", "qwen*_tokenizer", "t5_*tokenizer", "llama_tokenizer",
            "ace_lyrics_tokenizer", "byt5_tokenizer", "hydit_clip_tokenizer", "gemma*tokenizer*")  # fmt: skip
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
              "manylinux_2_12_x86_64", "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the folder anew and says how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--comfyui", type=Path, help="a checkout; without it ComfyUI's phases are left out there")
    parser.add_argument("--python", default="3.12", help="of the machine (3.12)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="to prepare (.gpu)")
    given = parser.parse_args(arguments)
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    pins = pinned(ROOT / "requirements.lock") | (pinned(given.comfyui / "requirements.txt") if given.comfyui else {})
    wanted = [*WHEELS, *(COMFY_WHEELS if given.comfyui else ())]
    fetch([pins.get(_plain(name), name) for name in wanted], given.folder / "wheels", given.python)
    for name, kept in TRIMMED.items():
        if name in pins or name == "bitsandbytes":
            unpack(pins.get(name, name), kept, given.folder / "site", given.python)
    if given.comfyui:
        copy_comfyui(given.comfyui, given.folder / "comfyui")
    for name, size in sizes(given.folder):
        print(f"{size / 2**20:6.1f} MiB  {name}")


def pinned(requirements: Path) -> dict[str, str]:
    """Packages whose version a list of requirements says, by name: "comfy-aimdo" -> "comfy-aimdo==0.4.13"."""
    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    return {_plain(line.partition("==")[0]): line for line in lines if "==" in line}


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def fetch(names: Sequence[str], folder: Path, python: str) -> None:
    """Wheels of packages, without what they need, for Linux on x86-64."""
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    subprocess.run([*command, "--dest", str(folder), *names], check=True)


def unpack(name: str, kept: Callable[[str], bool], site: Path, python: str) -> None:
    """A package without the files that are not kept, ready to be imported."""
    with tempfile.TemporaryDirectory() as place:
        fetch([name], Path(place), python)
        [wheel] = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site, [member for member in archive.namelist() if kept(member)])


def copy_comfyui(checkout: Path, folder: Path) -> None:
    """What a process needs of ComfyUI without its server's pages and models' tokenizers."""
    anywhere = shutil.ignore_patterns(*_NOWHERE)

    def ignored(place: str, names: list[str]) -> set[str]:
        return anywhere(place, names) | (_LEFT_OUT if Path(place) == checkout else set())

    shutil.copytree(checkout, folder, ignore=ignored)
    (folder / "models").mkdir(exist_ok=True)


def sizes(folder: Path) -> list[tuple[str, int]]:
    """Bytes of each part, and of all."""
    parts = [(part.name, _size(part)) for part in sorted(folder.iterdir())]
    return [*parts, ("all of it", sum(size for _, size in parts))]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()

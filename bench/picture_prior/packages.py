"""The packages that the pictures come from: pinned versions, fetched by npm and checked against their hashes."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """A package of npm in one version.

    Args:
        name: as npm spells it.
        version: the only one that is used.
        integrity: SHA-512 of the archive in base64, without "sha512-".
    """

    name: str
    version: str
    integrity: str

    def archive(self, folder: Path) -> Path:
        """Path of the archive in a folder; fetched if it is not there.

        Raises:
            RuntimeError: npm is missing or fails, or the archive is another than the pinned one.
        """
        path = folder / f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self._fetch(folder)
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        if digest != self.integrity:
            raise RuntimeError(f"{path} is not the pinned {self.name}@{self.version}: delete it and try again")
        return path

    def _fetch(self, folder: Path) -> None:
        if shutil.which("npm") is None:
            raise RuntimeError("the pictures are fetched with npm, which is missing: install Node.js")
        log.info("fetching %s@%s", self.name, self.version)
        command = ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm could not fetch {self.name}@{self.version}: {done.stderr.strip()[-500:]}")


NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
)
TWEMOJI = Package(
    "@iconify-json/twemoji",
    "1.2.5",
    "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
)
FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
OPENMOJI = Package(
    "openmoji",
    "17.0.0",
    "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
)
NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
ALL = (NOTO, TWEMOJI, FLUENT, OPENMOJI, NAMES)


def members(archive: Path, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(name without folder and suffix, content) of an archive's files.

    Args:
        folder: inside the package, such as "assets/"; "" for its root.
        suffix: ".webp", ".svg", ".json".
    """
    start = f"package/{folder}"
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(start) and member.name.endswith(suffix):
                file = tar.extractfile(member)
                assert file is not None
                yield member.name.removeprefix(start).removesuffix(suffix), file.read()


def read_json(archive: Path, name: str) -> Any:
    """A JSON file of an archive, by its name inside the package, such as "icons.json"."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{name}")
        assert file is not None
        return json.load(file)

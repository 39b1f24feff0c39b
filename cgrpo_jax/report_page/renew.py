"""Updates the vendored scripts: `python -m cgrpo_jax.report_page.renew uplot=1.6.32 temml=0.13.5`.

Needs npm, which checks each package against the hash in its registry. Only the files in FILES are kept.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from typing import Any

VENDOR = pathlib.Path(__file__).parent / "vendor"
FILES = {
    "uplot": {"dist/uPlot.iife.min.js": "", "dist/uPlot.min.css": "", "LICENSE": "LICENSE-uPlot"},
    "temml": {"dist/temml.min.js": "", "dist/Temml-Local.css": "", "LICENSE": "LICENSE-Temml"},
}


def fetch(name: str, version: str) -> dict[str, Any]:
    """Puts the files of a package into `vendor/`; returns its version, licence and hashes."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", f"{name}@{version}", "--json", "--silent"]
        (packed,) = json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)
        hashes = {}
        with tarfile.open(pathlib.Path(folder) / packed["filename"]) as archive:
            described = archive.extractfile("package/package.json")
            assert described is not None
            licence = json.load(described)["license"]
            for member, kept in FILES[name].items():
                file = archive.extractfile(f"package/{member}")
                assert file is not None, member
                target = VENDOR / (kept or pathlib.PurePosixPath(member).name)
                target.write_bytes(file.read())
                hashes[target.name] = hashlib.sha256(target.read_bytes()).hexdigest()
    return {"version": version, "licence": licence, "integrity": packed["integrity"], "sha256": hashes}


def main() -> None:
    wanted = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if set(wanted) != set(FILES):
        sys.exit(f"error: name a version of each of {', '.join(FILES)}: uplot=1.6.32 temml=0.13.5")
    found = {name: fetch(name, version) for name, version in wanted.items()}
    (VENDOR / "versions.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Puts into a wheel what lies outside of the packages: recipes, and the tiny repository.

`glimpseprune/package_files.py` looks for them there, or in a clone where they are.
"""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("recipes", "hub_configs/tiny")
CODE = "modeling_glimpseprune"  # links to it may have become plain files in this clone


class PackageFiles(BuildHookInterface):
    """Names each file and its place in the wheel; an editable install takes the clone's own."""

    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        for folder in FOLDERS:
            for path in sorted((root / folder).iterdir()):
                if path.is_dir():
                    continue
                source = root / CODE / path.name if path.suffix == ".py" else path
                build_data["force_include"][str(source)] = f"glimpseprune/{folder}/{path.name}"

"""Puts into a wheel what lies outside of the packages: recipes, and the tiny repositories.

`glimpseprune/package_files.py` looks for them there, or in a clone where they are. A link goes in
as the file it leads to.
"""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("recipes", "hub_configs/tiny", "hub_configs/tiny_early")


class PackageFiles(BuildHookInterface):
    """Names the folders' places in a wheel; an editable install uses the clone's own."""

    def initialize(self, version: str, build_data: dict) -> None:
        if version != "editable":
            build_data["force_include"] |= {name: f"glimpseprune/{name}" for name in FOLDERS}

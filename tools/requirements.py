"""Prints the requirements of pyproject.toml, the extras' too, one per line: what `make deps` hands to pip."""

from __future__ import annotations

import sys
import tomllib


def main() -> None:
    with open(sys.argv[1], "rb") as file:
        project = tomllib.load(file)["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += [one for one in extra if not one.startswith(f"{project['name']}[")]
    print("\n".join(sorted(set(wanted))))


main()

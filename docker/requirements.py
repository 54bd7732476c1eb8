"""Print what harp-batch needs with its extra `cluster`: pip has no way to install only a package's dependencies."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
sys.stdout.write("\n".join([*project["dependencies"], *project["optional-dependencies"]["cluster"], ""]))

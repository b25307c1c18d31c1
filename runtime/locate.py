"""A folder on disk or an id of the hub: how a name is told apart, for models and adapters alike."""

from __future__ import annotations

import re
from pathlib import Path


def is_hub_id(name: str | Path) -> bool:
    """True for what may be a hub id, `owner/name` or a bare name, and is no mistyped path.

    `folder/name` beside a folder of that name is a mistyped path: no use asking the hub for it.
    """
    if isinstance(name, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        return False
    return "/" not in name or not Path(name).parent.is_dir()

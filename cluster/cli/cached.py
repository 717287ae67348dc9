"""`bora models --cached`: the checkpoints that this host's cache holds."""

from __future__ import annotations

import json
import time

from rich.table import Table
from rich.text import Text

from cluster.cache_limits import GIB
from cluster.cache_room import stored
from cluster.cli.render import age, page_console
from cluster.probes.host import cache_folder


def show_cached(*, json_: bool) -> None:
    """Print them, those first that were used least recently."""
    folder = cache_folder().expanduser()
    found = [
        (each, bool(each.commit) and each.repo.is_used(each.commit)) for each in stored(folder)
    ]
    if json_:
        entries = [
            {
                "repo": each.repo.name,
                "commit": each.commit,
                "bytes": each.size_bytes,
                "used_s": each.used_s,
                "in_use": in_use,
            }
            for each, in_use in found
        ]
        print(json.dumps({"folder": str(folder), "models": entries}))
        return
    table = Table("repository", "commit", "GiB", "last used", "state", box=None)
    for each, in_use in found:
        state = "in use" if in_use else "" if each.commit else "unfinished"
        since = age(time.time() - each.used_s)
        size = f"{each.size_bytes / GIB:.2f}"
        table.add_row(each.repo.name, each.commit[:12], size, f"{since} ago", state)
    console = page_console()
    console.print(Text(f"{len(found)} in {folder}"))
    if found:
        console.print(table)

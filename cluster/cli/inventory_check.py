"""Before anything is started: are the hosts what the plan takes them for?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from cluster.control_api import ControlClient
from cluster.errors import InventoryDiffers
from cluster.messages import NodeList
from placement.catalogue import Catalogue
from placement.checkpoint_room import checkpoint_bytes
from placement.inventory import Inventory
from placement.mismatches import mismatches
from placement.node_facts import NodeFacts
from placement.plan import Plan

WAIT_S = 200.0  # of a probe that is under way: a minute for the host, two for its GPUs
_PERIOD_S = 0.5


def require_truth(
    plan: Plan,
    declared: Inventory,
    found: Sequence[NodeFacts],
    catalogue: Catalogue,
    console: Console,
) -> None:
    """Print where `declared` and the hosts differ.

    Simulated engines need no GPU: what only they would run on is told, not refused.

    Raises:
        InventoryDiffers: an engine would not start there, or not do what was planned.
    """
    if not found:
        return
    needed = checkpoint_bytes(plan, catalogue)
    lies = mismatches(declared, found, catalogue=catalogue, checkpoints=needed)
    serious = {variant.pool for variant in plan.variants if variant.shape.engine != "sim"}
    refused = [lie for lie in lies if lie.severity == "error" and lie.pool in serious]
    for lie in lies:
        word, style = ("error", "red") if lie in refused else ("warning", "yellow")
        console.print(Text(f"{word}: {lie}", style=style))
    if refused:
        hosts = ", ".join(sorted({lie.host for lie in refused}))
        raise InventoryDiffers(
            f"{hosts}: not what was declared; nothing was changed. Cure it, correct the "
            f"inventory, or deploy with --trust-inventory"
        )


def probed_nodes(client: ControlClient, console: Console) -> NodeList:
    """What the controller knows of the nodes, once it has probed all of them."""
    deadline = time.monotonic() + WAIT_S
    said: tuple[str, ...] = ()
    while True:
        known = client.nodes()
        if not known.pending or time.monotonic() > deadline:
            return known
        if known.pending != said:
            said = known.pending
            console.print(f"probing {', '.join(said)}", markup=False)
        time.sleep(_PERIOD_S)

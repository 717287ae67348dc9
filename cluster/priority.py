"""Priority: engines, replicas, controller and gateways run at that of the shell that started Ray.

Each Ray worker adds `RAY_worker_niceness`, by default 15, to its own niceness, and what it starts
inherits that: beside anything else on its host an engine would get a thirtieth of the CPU that it
asks for. The variable counts in the environment of `ray start`; only root could take it back later.
"""

from __future__ import annotations

VARIABLE = "RAY_worker_niceness"
NORMAL_PRIORITY = {VARIABLE: "0"}

"""NodeLogs: parts of engines' logs, read where they lie: on the nodes of the Ray cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.log_tail import last_lines, lines_after
from cluster.messages import LogPart, LogQuery
from placement.errors import ConfigError

ANSWER_S = 20.0  # a worker may have to start first


class NodeLogs:
    """Below `folder`, which has the same path on every node. Nothing else is read for anybody."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def read(self, query: LogQuery) -> LogPart:
        """The part that is asked for.

        Raises:
            ConfigError: the file is no log of bora's.
        """
        if not Path(query.file).is_relative_to(self._folder) or ".." in Path(query.file).parts:
            raise ConfigError(f"{query.file} is no log of bora's: these are in {self._folder}")
        if query.node_id == ray.get_runtime_context().get_node_id():
            return await asyncio.to_thread(log_part, query, self._folder)
        task = _on(query.node_id).remote(query.model_dump_json(), str(self._folder))
        try:
            answer = asyncio.wrap_future(task.future())
            return LogPart.model_validate_json(await asyncio.wait_for(answer, ANSWER_S))
        except TimeoutError:
            return LogPart(problem=f"node {query.node_id[:8]} does not answer")
        except ray.exceptions.RayError:
            return LogPart(problem=f"node {query.node_id[:8]} is gone, and this log with it")


def log_part(query: LogQuery, folder: Path) -> LogPart:
    """Of a file of this node that lies in `folder`, also by way of links."""
    file = Path(query.file).resolve()
    if not file.is_relative_to(folder.resolve()):
        return LogPart(missing=True)
    if query.offset is None:
        return last_lines(file, query.lines, partial=query.partial)
    return lines_after(file, query.offset)


def _on(node_id: str) -> Any:
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(_log_part).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)


def _log_part(query: str, folder: str) -> str:
    return log_part(LogQuery.model_validate_json(query), Path(folder)).model_dump_json()

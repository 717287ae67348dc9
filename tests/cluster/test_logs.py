"""`bora logs`: the command itself, against a controller over real HTTP and files on disk."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.context import Context
from cluster.control_api import serve_control_api
from cluster.messages import FleetStatus, ReplicaStatus, VariantStatus
from cluster.names import log_folder
from cluster.processes import free_ports
from tests.cluster.test_control_api import TOKEN, RememberingControl


class Fleet(RememberingControl):
    """A controller whose replicas are `variants`; their logs lie below `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.run_dir = run_dir
        self.variants: list[VariantStatus] = []

    def status(self) -> FleetStatus:
        return FleetStatus(
            fleet="test", table_version=1, variants=tuple(self.variants), gateways=(), events=()
        )

    def log(self, model: str, replica: str, text: str) -> Path:
        file = self.run_dir / "logs" / log_folder(model) / f"{replica}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def runs(self, model: str, *replicas: str, state: str = "ready", **changes: Any) -> None:
        """`model` with these replicas, each with a log that says which it is."""
        rows = [
            ReplicaStatus(
                replica=replica,
                state=state,
                stage="",
                age_s=1.0,
                node="here",
                pid=1,
                url="",
                log_file=str(self.log(model, replica, f"{model} on {replica}\n")),
                log_tail="",
                running=0,
                waiting=0,
                kv_cache_usage=0.0,
                kv_cache_tokens=None,
                weights_bytes=None,
            )
            for replica in replicas
        ]
        fields: dict[str, Any] = {
            "model": model,
            "aliases": (),
            "variant": f"{model}@pool",
            "engine": "sim",
            "pool": "pool",
            "ready": len(rows),
            "wanted": len(rows),
            "min_replicas": 0,
            "max_replicas": 4,
            "in_flight": 0.0,
            "queued": 0,
            "planned_kv_cache_tokens": 1,
            "planned_weights_bytes": 1,
            "replicas": tuple(rows),
            "last_event": "",
        }
        self.variants.append(VariantStatus(**{**fields, **changes}))


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    control = Fleet(tmp_path / "run")
    (control.run_dir / "logs").mkdir(parents=True)
    [port] = free_ports(1)
    runner = await serve_control_api(control, "127.0.0.1", port, TOKEN)
    context = Context(
        ray_address="",
        ray_tmpdir="",
        controller_url=f"http://127.0.0.1:{port}",
        token=TOKEN,
        run_dir=str(control.run_dir),
    )
    (tmp_path / "context.json").write_text(context.model_dump_json())
    yield control
    await runner.cleanup()


@asynccontextmanager
async def logs(fleet: Fleet, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", "logs", *arguments),
        env={**os.environ, "BORA_STATE": str(fleet.run_dir.parent), "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def said(fleet: Fleet, *arguments: str) -> tuple[int, str, str]:
    async with logs(fleet, *arguments) as process, asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def lines_until(process: asyncio.subprocess.Process, last: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    async with asyncio.timeout(60):
        while last not in lines:
            line = await process.stdout.readline()
            assert line, "the command has ended"
            lines.append(line.decode().rstrip("\n"))
    return lines


async def test_only_replicas_that_run_are_shown(fleet: Fleet) -> None:
    fleet.log("chat", "r0", "from before\n")
    fleet.runs("chat", "r1")
    fleet.runs("other", "r2")

    assert await said(fleet, "chat") == (0, "chat on r1\n", "")


@pytest.mark.parametrize("state", ["failed", "stopped"])
async def test_of_a_model_that_does_not_run_the_newest_log_is_shown(
    fleet: Fleet, state: str
) -> None:
    fleet.runs("chat", "r1", state=state)
    os.utime(fleet.log("chat", "r0", "older\n"), (1, 1))

    assert await said(fleet, "chat") == (0, "chat on r1\n", "")


async def test_of_a_model_that_was_deleted_the_logs_remain(fleet: Fleet) -> None:
    fleet.log("org/gone", "r1", "bye\n")

    assert await said(fleet, "org/gone") == (0, "bye\n", "")


async def test_a_model_that_never_ran_has_no_log(fleet: Fleet) -> None:
    fleet.runs("chat")

    code, _, err = await said(fleet, "chat")

    assert code == 2
    assert "no replica of chat has run yet" in err


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("org/chat", "org/chat on abc1\n"),
        ("org/chat/abc1", "org/chat on abc1\n"),
        ("org/chat/c1", "org/chat on abc1\n"),
        ("org/chat/big", "org/chat/big on abc2\n"),
        ("org/chat/big/abc2", "org/chat/big on abc2\n"),
        ("talk", "org/chat on abc1\n"),
        ("my/talk/abc1", "org/chat on abc1\n"),
        ("org--chat", "org--chat on abc3\n"),
    ],
)
async def test_a_target_is_the_longest_model_or_alias_and_a_replica(
    fleet: Fleet, target: str, shown: str
) -> None:
    fleet.runs("org/chat", "abc1", aliases=("talk", "my/talk"))
    fleet.runs("org/chat/big", "abc2")
    fleet.runs("org--chat", "abc3")

    assert await said(fleet, target) == (0, shown, "")


@pytest.mark.parametrize(
    ("target", "hint"), [("chatt", "did you mean 'chat'"), ("chat/r9", "did you mean 'chat/r1'")]
)
async def test_an_unknown_target_is_exit_2_with_the_nearest(
    fleet: Fleet, target: str, hint: str
) -> None:
    fleet.runs("chat", "r1")

    code, out, err = await said(fleet, target)

    assert (code, out) == (2, "")
    assert hint in err


async def test_several_replicas_have_headings_and_the_last_lines_are_kept(fleet: Fleet) -> None:
    fleet.runs("chat", "r1", "r2")
    one = fleet.log("chat", "r1", "".join(f"{number:500}\n" for number in range(99)) + "open end")
    two = fleet.log("chat", "r2", "")

    code, out, _ = await said(fleet, "chat", "-n", "3")

    assert code == 0
    assert [line.strip() for line in out.splitlines()] == [
        *(f"==> {one} <==", "97", "98", "open end"),
        f"==> {two} <==",
    ]


async def test_all_running_replicas_are_followed_each_line_with_its_origin(fleet: Fleet) -> None:
    fleet.runs("chat", "r1", "r2")
    async with logs(fleet, "chat", "--follow") as process:
        await lines_until(process, "chat on r2")
        for replica in ("r1", "r2"):
            with (fleet.run_dir / "logs" / "chat" / f"{replica}.log").open("a") as log:
                log.write(f"more of {replica}\nhalf a li")
        followed = await lines_until(process, "r2: more of r2")
        with (fleet.run_dir / "logs" / "chat" / "r1.log").open("a") as log:
            log.write("ne\n")
        followed += await lines_until(process, "r1: half a line")

    assert sorted(followed) == ["r1: half a line", "r1: more of r1", "r2: more of r2"]


async def test_a_log_that_does_not_exist_yet_is_waited_for(fleet: Fleet) -> None:
    file = fleet.run_dir / "logs" / "gateway.log"
    async with logs(fleet, "gateway", "-f") as process:
        assert process.stderr is not None
        async with asyncio.timeout(60):
            assert b"nothing on this machine yet" in await process.stderr.readline()
        file.write_text("listening\n")

        assert await lines_until(process, "listening") == ["listening"]


def test_no_two_models_share_a_log_folder() -> None:
    names = ["a/b", "a--b", "a%2Fb", "a:b", "a b"]

    assert len({log_folder(name) for name in names}) == len(names)
    assert not any("/" in log_folder(name) for name in names)

"""`bora logs`: the command itself, against a controller over real HTTP and files on disk."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.context import Context
from cluster.control_api import serve_control_api
from cluster.log_tail import MOST_BYTES, lines_after
from cluster.messages import (
    Event,
    EventKind,
    EventList,
    FleetStatus,
    LogPart,
    LogQuery,
    ReplicaStatus,
    VariantStatus,
)
from cluster.names import log_folder
from cluster.node_logs import NodeLogs, log_part
from cluster.processes import free_ports
from placement.errors import ConfigError
from tests.cluster.test_control_api import TOKEN, RememberingControl


class Fleet(RememberingControl):
    """A controller whose replicas are `variants`; their logs lie below `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.run_dir = run_dir
        self.variants: list[VariantStatus] = []
        self.happened: list[Event] = []
        self.elsewhere: dict[tuple[str, str], bytes] = {}  # logs by node and file
        [self.port] = free_ports(1)

    async def up(self) -> None:
        self.runner = await serve_control_api(self, "127.0.0.1", self.port, TOKEN)

    async def down(self) -> None:
        await self.runner.cleanup()

    def events(self, after: int) -> EventList:
        return EventList(events=tuple(self.happened[after:]))

    async def logs(self, query: LogQuery) -> LogPart:
        log = self.elsewhere.get((query.node_id, query.file))
        if log is None:
            return LogPart(problem=f"node {query.node_id} is gone, and this log with it")
        copy = self.run_dir / "copy.log"
        copy.write_bytes(log)
        return log_part(query.model_copy(update={"file": str(copy)}), self.run_dir)

    def tell(self, kind: EventKind, text: str, **changes: str) -> None:
        """Something happened to `chat`."""
        number = len(self.happened) + 1
        fields = {"model": "chat", "node": "here", **changes}
        self.happened.append(
            Event.model_validate(
                {"number": number, "at_s": 1.0, "kind": kind, "text": text, **fields}
            )
        )

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
        self.variants = [each for each in self.variants if each.model != model]
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
    await control.up()
    context = Context(
        ray_address="",
        ray_tmpdir="",
        controller_url=f"http://127.0.0.1:{control.port}",
        token=TOKEN,
        run_dir=str(control.run_dir),
    )
    (tmp_path / "context.json").write_text(context.model_dump_json())
    yield control
    await control.down()


def logs(fleet: Fleet, *arguments: str) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    return bora(fleet, "logs", *arguments)


def _hears_ctrl_c() -> None:
    """Whatever started the tests: a shell has what it runs in the background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@asynccontextmanager
async def bora(fleet: Fleet, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", *arguments),
        env={**os.environ, "BORA_STATE": str(fleet.run_dir.parent), "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=_hears_ctrl_c,
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


async def test_a_log_that_may_not_be_read_is_told(fleet: Fleet) -> None:
    (fleet.run_dir / "logs" / "gateway.log").mkdir()  # as root every file may be read

    code, _, error = await said(fleet, "gateway")

    assert code == 0
    assert "gateway.log: cannot be read: Is a directory" in error


async def test_a_log_that_does_not_exist_yet_is_waited_for(fleet: Fleet) -> None:
    file = fleet.run_dir / "logs" / "gateway.log"
    async with logs(fleet, "gateway", "-f") as process:
        assert process.stderr is not None
        async with asyncio.timeout(60):
            assert b"nothing there yet" in await process.stderr.readline()
        file.write_text("listening\n")

        assert await lines_until(process, "listening") == ["listening"]


def a_far_replica(fleet: Fleet, replica: str, text: str) -> None:
    """A replica of `chat` on node b, whose log is not on this host."""
    file = fleet.run_dir / "logs" / "chat" / f"{replica}.log"
    fleet.runs("chat", replica)
    file.unlink()
    [variant] = fleet.variants
    [row] = variant.replicas
    far = row.model_copy(update={"node": "b", "node_id": "id-b"})
    fleet.variants = [variant.model_copy(update={"replicas": (far,)})]
    fleet.elsewhere["id-b", str(file)] = text.encode()


async def test_a_log_on_another_node_is_read_there(fleet: Fleet) -> None:
    a_far_replica(fleet, "r1", "1\n2\n3\nopen end")

    assert await said(fleet, "chat", "-n", "2") == (0, "3\nopen end\n", "")


async def test_a_log_on_another_node_is_followed(fleet: Fleet) -> None:
    a_far_replica(fleet, "r1", "first\n")
    [where] = fleet.elsewhere
    async with logs(fleet, "chat/r1", "-f") as process:
        await lines_until(process, "first")
        fleet.elsewhere[where] += b"second\nhalf a li"

        assert await lines_until(process, "second") == ["second"]
        del fleet.elsewhere[where]
        [gone] = await lines_until(
            process, f"==> b:{where[1]}: node id-b is gone, and this log with it <=="
        )
        assert gone


async def test_who_replaces_a_replica_is_followed_on_and_what_happened_is_said(
    fleet: Fleet,
) -> None:
    fleet.runs("chat", "r1")
    fleet.runs("other", "r9")
    async with logs(fleet, "chat/r1", "-f") as process:
        await lines_until(process, "chat on r1")
        fleet.tell("replica-died", "replica r1: failed", replica="r1", reason="out of memory")
        fleet.tell("replica-started", "replica r9: starting", replica="r9", model="other")
        fleet.tell("replica-started", "replica r2: starting", replica="r2", reason="replaces r1")
        fleet.runs("chat", "r2")

        followed = await lines_until(process, "r2: chat on r2")

    assert followed == [
        "==> replica r1: failed on here (out of memory) <==",
        "==> replica r2: starting on here (replaces r1) <==",
        "r2: chat on r2",
    ]


async def test_who_replaces_a_replica_is_said_by_a_new_head_that_counts_events_anew(
    fleet: Fleet,
) -> None:
    fleet.runs("chat", "r1")
    for _ in range(5):
        fleet.tell("replica-ready", "before")
    async with logs(fleet, "chat", "-f") as process:
        await lines_until(process, "chat on r1")
        await fleet.down()
        await lines_until_like(process, "logs on this host go on")
        fleet.happened = []
        fleet.tell("replica-lost", "replica r1: silent", replica="r1")
        await fleet.up()

        await lines_until(process, "==> replica r1: silent on here <==")


async def lines_until_like(process: asyncio.subprocess.Process, part: str) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while part not in (line := (await process.stdout.readline()).decode()):
            assert line, "the command has ended"


@pytest.mark.parametrize("command", [("logs", "chat"), ("events",)])
async def test_ctrl_c_ends_what_is_followed_without_an_error(
    fleet: Fleet, command: tuple[str, ...]
) -> None:
    fleet.runs("chat", "r1")
    fleet.tell("replica-ready", "chat on r1")
    async with bora(fleet, *command, "-f") as process:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            while b"chat on r1" not in await process.stdout.readline():
                pass
        process.send_signal(signal.SIGINT)

        async with asyncio.timeout(60):
            _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


async def test_events_are_followed_over_a_restart_of_the_controller(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.tell("replica-ready", "it is ready")
    async with bora(fleet, "events", "-f") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.timeout(60):
            assert b"it is ready" in await process.stdout.readline()
            await fleet.down()
            assert b"asking again" in await process.stderr.readline()
            fleet.tell("replica-ready", "another is")
            await fleet.up()
            assert b"another is" in await process.stdout.readline()


async def test_only_logs_of_bora_are_read_for_anybody(tmp_path: Path) -> None:
    logs_of_nodes = NodeLogs(tmp_path / "logs")
    for file in ("/etc/hostname", f"{tmp_path}/logs/../secret", f"{tmp_path}/logs-not"):
        with pytest.raises(ConfigError, match="is no log of bora's"):
            await logs_of_nodes.read(LogQuery(node_id="a", file=file))
    (tmp_path / "logs").mkdir()
    (tmp_path / "secret").write_text("secret\n")
    (tmp_path / "logs" / "link.log").symlink_to(tmp_path / "secret")

    query = LogQuery(node_id="a", file=str(tmp_path / "logs" / "link.log"))
    assert log_part(query, tmp_path / "logs").missing


def test_a_line_longer_than_a_part_comes_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("x" * (MOST_BYTES + 10) + "\nend\n")

    first = lines_after(file, 0)
    second = lines_after(file, first.offset)

    assert [len(line) for line in first.lines] == [MOST_BYTES]
    assert second.lines == ("x" * 10, "end")
    assert lines_after(file, second.offset).lines == ()


def test_no_two_models_share_a_log_folder() -> None:
    names = ["a/b", "a--b", "a%2Fb", "a:b", "a b"]

    assert len({log_folder(name) for name in names}) == len(names)
    assert not any("/" in log_folder(name) for name in names)

"""What the published `wrenn` package does inside a capsule: commands, processes, files, terminals, metrics and events."""

import asyncio
import os
import threading
import time

import httpx
import pytest
from wrenn import AsyncCapsule, Capsule
from wrenn.client import AsyncWrennClient, WrennClient
from wrenn.exceptions import WrennError, WrennNotFoundError, WrennValidationError


@pytest.fixture(scope="module")
def capsule():
    with Capsule() as capsule:
        yield capsule


def listed(capsule):
    return {process.pid: process for process in capsule.commands.list()}


def until(condition):
    limit = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < limit, "it did not come about"
        time.sleep(0.05)
    return value


# Commands and processes


def test_a_command_that_is_not_there(capsule):
    assert capsule.commands.run("no-such-command").exit_code == 127
    with pytest.raises(WrennValidationError, match="/no/such/place"):
        capsule.commands.run("true", cwd="/no/such/place")


def test_timeout(capsule):
    with pytest.raises(WrennError) as error:
        capsule.commands.run("sleep 4321 & sleep 4321", timeout=1)
    assert error.value.code == "timeout"
    until(lambda: capsule.commands.run("pgrep -x sleep").exit_code == 1)


def test_no_timeout(capsule):
    assert capsule.commands.run("sleep 1; echo done", timeout=None).stdout == "done\n"


def test_connect_follows_a_process_to_its_end(capsule):
    capsule.commands.run("mkfifo /tmp/fifo")
    handle = capsule.commands.run("echo first; read line < /tmp/fifo; echo $line >&2; exit 3", background=True, tag="waits")
    process = listed(capsule)[handle.pid]
    assert (process.tag, process.cmd, process.args[0]) == ("waits", "/bin/sh", "-c")
    events = capsule.commands.connect(handle.pid)
    assert (lambda start: (start.type, start.pid))(next(events)) == ("start", handle.pid)
    assert next(events).data == "first\n"
    capsule.commands.run("echo go on > /tmp/fifo")
    rest = list(events)
    assert [(event.type, getattr(event, "data", None)) for event in rest[:-1]] == [("stderr", "go on\n")]
    assert (rest[-1].type, rest[-1].exit_code) == ("exit", 3)
    assert handle.pid not in listed(capsule)


def test_connect_to_nobody(capsule):
    events = list(capsule.commands.connect(999999))
    assert [event.type for event in events] == ["error"]


def test_kill(capsule):
    handle = capsule.commands.run("sleep 4321", background=True)
    assert handle.tag and handle.pid in listed(capsule)
    capsule.commands.kill(handle.pid)
    until(lambda: handle.pid not in listed(capsule))
    with pytest.raises(WrennNotFoundError):
        capsule.commands.kill(handle.pid)


def test_stream(capsule):
    events = list(capsule.commands.stream("for i in 1 2 3; do echo $i; echo e$i >&2; done; exit 4"))
    text = lambda kind: "".join(event.data for event in events if event.type == kind)
    assert (events[0].type, events[-1].type, events[-1].exit_code) == ("start", "exit", 4)
    assert events[0].pid > 1
    assert (text("stdout"), text("stderr")) == ("1\n2\n3\n", "e1\ne2\ne3\n")
    events = list(capsule.commands.stream("/bin/echo", args=["$HOME", "as it is"]))
    assert [event.data for event in events if event.type == "stdout"] == ["$HOME as it is\n"]


def test_stream_comes_as_it_is_produced(capsule):
    capsule.commands.run("mkfifo /tmp/stream")
    events = capsule.commands.stream("echo one; read line < /tmp/stream; echo $line")
    assert next(events).type == "start" and next(events).data == "one\n"
    capsule.commands.run("echo two > /tmp/stream")
    assert next(events).data == "two\n"
    assert [event.type for event in events] == ["exit"]


def test_stream_of_characters_across_chunks(capsule):
    events = capsule.commands.stream("python3 -c 'print(\"\\u20ac\" * 300001, end=\"\")'")
    assert "".join(event.data for event in events if event.type == "stdout") == "\u20ac" * 300001


def test_a_stream_left_early_ends_nothing(capsule):
    events = capsule.commands.stream("echo here; exec sleep 4321")
    pid = next(events).pid
    events.close()
    assert pid in listed(capsule)
    capsule.commands.kill(pid)


# Files


@pytest.mark.parametrize("content", [b"", b"hello\n", "ça va? \u20ac".encode(), bytes(range(256)) * 4000])
def test_write_and_read(capsule, content):
    capsule.files.write("/tmp/w/deep/er/file", content)
    assert capsule.files.read_bytes("/tmp/w/deep/er/file") == content
    assert b"".join(capsule.files.download_stream("/tmp/w/deep/er/file")) == content
    assert capsule.files.read("/tmp/w/deep/er/file") == content.decode(errors="replace")


def test_a_file_is_replaced(capsule):
    capsule.files.write("/tmp/replaced", "much longer than what follows")
    capsule.files.write("/tmp/replaced", "short")
    assert capsule.commands.run("cat /tmp/replaced; stat -c ' %U %a' /tmp/replaced").stdout == "short root 644\n"


def test_relative_paths_are_below_home(capsule):
    capsule.files.write("relative/file", "x")
    assert capsule.commands.run("cat /root/relative/file").stdout == "x"
    assert capsule.files.read("relative/file") == capsule.files.read("~/relative/file") == "x"


def test_streams(capsule):
    chunks = [os.urandom(100_003) for _ in range(50)]
    capsule.files.upload_stream("/tmp/streamed", iter([b"", *chunks, b""]))
    expected = b"".join(chunks)
    assert b"".join(capsule.files.download_stream("/tmp/streamed")) == expected
    assert capsule.commands.run("stat -c %s /tmp/streamed").stdout == f"{len(expected)}\n"
    capsule.files.upload_stream("/tmp/streamed", iter([]))
    assert capsule.files.read_bytes("/tmp/streamed") == b""


def test_what_is_not_there(capsule):
    for call in (capsule.files.read, capsule.files.read_bytes, capsule.files.list, capsule.files.remove):
        with pytest.raises(WrennNotFoundError):
            call("/tmp/never/was")
    with pytest.raises(httpx.HTTPStatusError) as error:
        list(capsule.files.download_stream("/tmp/never/was"))
    assert error.value.response.status_code == 404


def test_list(capsule):
    capsule.commands.run("mkdir -p /tmp/l/a/b; cd /tmp/l; printf 12345 > file; chmod 640 file; echo 1 > a/1; ln -s file link; ln -s none broken; touch -d @1700000000 file")
    entries = {entry.name: entry for entry in capsule.files.list("/tmp/l")}
    assert sorted(entries) == ["a", "broken", "file", "link"]
    file = entries["file"]
    assert (file.path, file.type.value, file.size, file.mode, file.permissions) == ("/tmp/l/file", "file", 5, 0o640, "-rw-r-----")
    assert (file.owner, file.group, file.modified_at, file.symlink_target) == ("root", "root", 1700000000, None)
    assert (entries["a"].type.value, entries["link"].type.value, entries["broken"].type.value) == ("directory", "file", "symlink")
    assert entries["link"].symlink_target == "/tmp/l/file"
    paths = [entry.path for entry in capsule.files.list("/tmp/l", depth=3)]
    assert paths == [f"/tmp/l/{name}" for name in ("a", "a/1", "a/b", "broken", "file", "link")]
    assert len(capsule.files.list("/tmp/l", depth=0)) == 4
    with pytest.raises(WrennNotFoundError):
        capsule.files.list("/tmp/l/file")


def test_exists(capsule):
    capsule.files.write("/tmp/e/file", "")
    assert capsule.files.exists("/tmp/e/file") and capsule.files.exists("/tmp/e")
    assert not capsule.files.exists("/tmp/e/none")
    assert not capsule.files.exists("/tmp/none/none")
    assert not capsule.files.exists("/tmp/e/file/none")


def test_make_dir_and_remove(capsule):
    for _ in range(2):
        entry = capsule.files.make_dir("/tmp/m/a/b")
        assert (entry.path, entry.type.value) == ("/tmp/m/a/b", "directory")
    capsule.files.write("/tmp/m/a/b/file", "x")
    capsule.files.remove("/tmp/m/a/b/file")
    assert not capsule.files.exists("/tmp/m/a/b/file")
    capsule.files.remove("/tmp/m")
    assert not capsule.files.exists("/tmp/m")


# Terminals (more in test_wrenn.py)


def seen(term, text):
    """Reads until `text` was shown; everything shown so far."""
    shown = b""
    for event in term:
        if event.type == "output":
            shown += event.data
        assert event.type in ("output", "started", "ping"), event
        if text in shown:
            return shown
    raise AssertionError(f"no {text} in {shown}")


def test_what_a_terminal_showed_is_shown_again(capsule):
    with capsule.pty(cmd="/bin/sh", envs={"PS1": "> "}) as term:
        term.write(b"echo sc$((1))reen\n")
        seen(term, b"sc1reen\r\n")
        tag = term.tag
    with capsule.pty_connect(tag) as term:
        seen(term, b"sc1reen\r\n")
        term.kill()
        assert [event.exit_code for event in term if event.type == "exit"] == [-1]


def test_a_terminal_that_is_not_there(capsule):
    with capsule.pty_connect("no-such-tag") as term:
        event = next(iter(term))
        assert (event.type, event.fatal) == ("error", True)


# Metrics and events


def test_metrics(capsule):
    with WrennClient() as client:
        for range in (None, "10m", "2h", "24h"):
            metrics = client.capsules.metrics(capsule.capsule_id, range=range)
            assert metrics.sandbox_id == capsule.capsule_id
            assert metrics.points[-1].mem_bytes > 0 and metrics.points[-1].disk_bytes > 0
        with pytest.raises(WrennNotFoundError):
            client.capsules.metrics("cl-0000000000000000000000000")


def test_events():
    with WrennClient() as client:
        connected, told = threading.Event(), []

        def follow():
            for event in client.events.stream():
                told.append(event)
                connected.set()
                if event.event.value == "capsule.destroy":
                    return

        follower = threading.Thread(target=follow)
        follower.start()
        assert connected.wait(60)
        with Capsule() as capsule:
            id = capsule.capsule_id
        follower.join(60)
        assert not follower.is_alive()
        kinds = [event.event.value for event in told if event.resource is None or event.resource.id == id]
        assert kinds[0] == "connected" and kinds[-1] == "capsule.destroy"
        assert kinds.count("capsule.create") == 1
        assert told[-1].outcome.value == "success"


# The same, asynchronously


def test_async():
    async def run():
        async with await AsyncCapsule.create() as capsule:
            # Commands
            result = await capsule.commands.run("echo $A; pwd", envs={"A": "b"}, cwd="/usr/lib")
            assert result.stdout == "b\n/usr/lib\n"
            events = [event async for event in capsule.commands.stream("echo out; echo err >&2; exit 5")]
            assert sorted((event.type, getattr(event, "data", "")) for event in events[1:-1]) == [("stderr", "err\n"), ("stdout", "out\n")]
            assert events[-1].exit_code == 5
            handle = await capsule.commands.run("echo here; exec sleep 4321", background=True, tag="sleeper")
            assert ("sleeper", handle.pid) in [(process.tag, process.pid) for process in await capsule.commands.list()]
            follow = capsule.commands.connect(handle.pid)
            assert (await anext(follow)).type == "start" and (await anext(follow)).data == "here\n"
            await capsule.commands.kill(handle.pid)
            assert [event.type async for event in follow] == ["exit"]
            # Files
            data = os.urandom(1_000_000)

            async def chunks():
                for at in range(0, len(data), 65_537):
                    yield data[at : at + 65_537]

            await capsule.files.upload_stream("/tmp/a/streamed", chunks())
            assert await capsule.files.read_bytes("/tmp/a/streamed") == data
            assert b"".join([chunk async for chunk in capsule.files.download_stream("/tmp/a/streamed")]) == data
            await capsule.files.write("/tmp/a/text", "ça")
            assert await capsule.files.read("/tmp/a/text") == "ça"
            assert [entry.name for entry in await capsule.files.list("/tmp/a")] == ["streamed", "text"]
            assert (await capsule.files.make_dir("/tmp/a/d")).name == "d"
            assert (await capsule.files.make_dir("/tmp/a/d")).name == "d"
            assert await capsule.files.exists("/tmp/a/d")
            await capsule.files.remove("/tmp/a")
            assert not await capsule.files.exists("/tmp/a")
            # Terminals
            async with capsule.pty(cmd="/bin/sh", envs={"PS1": "> "}) as term:
                await term.write(b"echo sc$((1))reen\n")
                shown = b""
                while b"sc1reen\r\n" not in shown:
                    event = await anext(term)
                    shown += event.data if event.type == "output" else b""
                tag = term.tag
            async with capsule.pty_connect(tag) as term:
                await term.resize(132, 43)
                await term.write(b"stty size; exit 6\n")
                shown = [event async for event in term]
                assert shown[-1].exit_code == 6
                shown = b"".join(event.data for event in shown if event.type == "output")
                assert b"sc1reen\r\n" in shown and b"43 132\r\n" in shown
            async with AsyncWrennClient() as client:
                assert (await client.capsules.metrics(capsule.capsule_id)).points
                stream = client.events.stream()
                assert (await anext(stream)).event.value == "connected"
                await stream.aclose()

    asyncio.run(run())

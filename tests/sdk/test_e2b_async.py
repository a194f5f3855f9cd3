"""The published `e2b` package's asynchronous client, unmodified, straight at one envd."""

import asyncio
import functools
import io
import os

import pytest
from e2b import (
    AsyncSandbox,
    CommandExitException,
    FileNotFoundException,
    FileType,
    FilesystemEventType,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    TimeoutException,
)

CREATE, CHMOD, WRITE = FilesystemEventType.CREATE, FilesystemEventType.CHMOD, FilesystemEventType.WRITE
REMOVE, RENAME = FilesystemEventType.REMOVE, FilesystemEventType.RENAME


def in_a_loop(test):
    """Gives the test a sandbox and a directory of its own, in an event loop of its own."""

    @functools.wraps(test)
    def run():
        async def body():
            sandbox = await AsyncSandbox.create()
            home = f"/home/user/async_{test.__name__}"
            assert await sandbox.files.make_dir(home)
            await asyncio.wait_for(test(sandbox, home), 60)

        asyncio.run(body())

    # pytest must not ask for fixtures of the wrapped function's names.
    del run.__wrapped__
    return run


@in_a_loop
async def test_run(sandbox, home):
    assert await sandbox.is_running()
    out, err = [], []
    result = await sandbox.commands.run(
        "pwd; echo $MARK; echo err >&2", cwd=home, envs={"MARK": "ça"}, on_stdout=out.append, on_stderr=err.append
    )
    assert (result.stdout, result.stderr, result.exit_code) == (f"{home}\nça\n", "err\n", 0)
    assert ("".join(out), "".join(err)) == (result.stdout, result.stderr)
    with pytest.raises(CommandExitException) as failure:
        await sandbox.commands.run("exit 7", user="root")
    assert failure.value.exit_code == 7


@in_a_loop
async def test_character_cut_by_the_end(sandbox, home):
    result = await sandbox.commands.run(r"head -c 8191 /dev/zero | tr '\0' a; printf '\342'")
    assert result.stdout == "a" * 8191 + "\ufffd"


@in_a_loop
async def test_many_at_once(sandbox, home):
    results = await asyncio.gather(*(sandbox.commands.run(f"echo {n}; seq 2000 | tail -n 1") for n in range(64)))
    assert [result.stdout for result in results] == [f"{n}\n2000\n" for n in range(64)]


@in_a_loop
async def test_background_input_and_kill(sandbox, home):
    handle = await sandbox.commands.run("cat; echo done", background=True, stdin=True)
    assert handle.pid in [process.pid for process in await sandbox.commands.list()]
    await sandbox.commands.send_stdin(handle.pid, "one ")
    await handle.send_stdin(b"two\n")
    await handle.close_stdin()
    assert (await handle.wait()).stdout == "one two\ndone\n"
    handle = await sandbox.commands.run("sleep 4321", background=True)
    assert await handle.kill()
    with pytest.raises(CommandExitException):
        await handle.wait()
    assert not await sandbox.commands.kill(handle.pid)


@in_a_loop
async def test_stream_input(sandbox, home):
    handle = await sandbox.commands.run("sha256sum", background=True, stdin=True)
    async with sandbox.commands.stream_input(handle.pid) as stdin:
        for n in range(10000):
            await stdin.send(f"{n:07}\n")
    await handle.close_stdin()
    expected = await sandbox.commands.run("seq -f %07.0f 0 9999 | sha256sum")
    assert (await handle.wait()).stdout == expected.stdout


@in_a_loop
async def test_connect_and_timeout(sandbox, home):
    started = await sandbox.commands.run("read line; echo got $line", background=True, stdin=True)
    await started.disconnect()
    again = await sandbox.commands.connect(started.pid)
    await again.send_stdin("more\n")
    assert (await again.wait()).stdout == "got more\n"
    with pytest.raises(NotFoundException):
        await sandbox.commands.connect(4194303)
    with pytest.raises(TimeoutException):
        await sandbox.commands.run("sleep 5432", timeout=1)


@in_a_loop
async def test_files(sandbox, home):
    data = os.urandom(2_000_000)

    async def chunks():
        for at in range(0, len(data), 10007):
            yield data[at : at + 10007]

    for octets in (False, True):
        await sandbox.files.write(f"{home}/text", "ça va", use_octet_stream=octets)
        assert await sandbox.files.read(f"{home}/text") == "ça va"
    for content in (data, io.BytesIO(data), chunks()):
        await sandbox.files.write(f"{home}/binary", content)
        assert await sandbox.files.read(f"{home}/binary", format="bytes") == data
    await sandbox.files.write(f"{home}/zipped", data, gzip=True, metadata={"kind": "zip"})
    assert await sandbox.files.read(f"{home}/zipped", format="bytes", gzip=True) == data
    async with await sandbox.files.read(f"{home}/zipped", format="stream") as stream:
        assert b"".join([chunk async for chunk in stream]) == data
    infos = await sandbox.files.write_files([{"path": f"{home}/d/{n}", "data": f"{n}"} for n in range(5)])
    assert [info.name for info in infos] == ["0", "1", "2", "3", "4"]
    with pytest.raises(FileNotFoundException):
        await sandbox.files.read(f"{home}/none")


@in_a_loop
async def test_directories(sandbox, home):
    assert await sandbox.files.make_dir(f"{home}/a/b")
    assert not await sandbox.files.make_dir(f"{home}/a/b")
    await sandbox.files.write(f"{home}/a/b/file", "12345", metadata={"k": "v"})
    listed = await sandbox.files.list(home, depth=3)
    assert [(entry.path, entry.type) for entry in listed] == [
        (f"{home}/a", FileType.DIR),
        (f"{home}/a/b", FileType.DIR),
        (f"{home}/a/b/file", FileType.FILE),
    ]
    info = await sandbox.files.get_info(f"{home}/a/b/file")
    assert (info.size, info.owner, info.metadata) == (5, "user", {"k": "v"})
    moved = await sandbox.files.rename(f"{home}/a/b", f"{home}/c")
    assert moved.path == f"{home}/c"
    assert await sandbox.files.exists(f"{home}/c/file") and not await sandbox.files.exists(f"{home}/a/b")
    await sandbox.files.remove(f"{home}/c")
    assert [entry.name for entry in await sandbox.files.list(home)] == ["a"]


class Watch:
    """A watch whose events can be waited for."""

    def __init__(self):
        self.events, self.exits, self.news = [], [], asyncio.Condition()

    async def on_event(self, event):
        async with self.news:
            self.events.append(event)
            self.news.notify_all()

    async def on_exit(self, error):
        async with self.news:
            self.exits.append(error)
            self.news.notify_all()

    async def until(self, last):
        async with self.news:
            await self.news.wait_for(lambda: any(event.name == last for event in self.events))
            events, self.events = [(event.name, event.type) for event in self.events], []
            return events


@in_a_loop
async def test_an_upload_is_three_events(sandbox, home):
    watch = Watch()
    handle = await sandbox.files.watch_dir(home, watch.on_event, on_exit=watch.on_exit)
    await sandbox.files.write(f"{home}/file", "content")
    await sandbox.commands.run("mkdir last", cwd=home)
    assert await watch.until("last") == [("file", CREATE), ("file", CHMOD), ("file", WRITE), ("last", CREATE)]
    await sandbox.commands.run("mv file other; rm other; mkdir more", cwd=home)
    assert await watch.until("more") == [("file", RENAME), ("other", CREATE), ("other", REMOVE), ("more", CREATE)]
    assert watch.exits == []
    await handle.stop()
    assert watch.exits == [None]


@in_a_loop
async def test_recursive_watch(sandbox, home):
    await sandbox.commands.run("mkdir -p a/b", cwd=home)
    watch = Watch()
    handle = await sandbox.files.watch_dir(home, watch.on_event, recursive=True, include_entry=True)
    await sandbox.files.write(f"{home}/a/b/file", "content")
    await sandbox.commands.run("mkdir new", cwd=home)
    async with watch.news:
        await watch.news.wait_for(lambda: len(watch.events) == 4)
    assert watch.events[2].entry.path == f"{home}/a/b/file" and watch.events[3].entry.type == FileType.DIR
    assert await watch.until("new") == [("a/b/file", CREATE), ("a/b/file", CHMOD), ("a/b/file", WRITE), ("new", CREATE)]
    await sandbox.files.write(f"{home}/new/file", "content")
    await sandbox.commands.run("mkdir last", cwd=home)
    assert await watch.until("last") == [("new/file", CREATE), ("new/file", CHMOD), ("new/file", WRITE), ("last", CREATE)]
    await handle.stop()


@in_a_loop
async def test_what_cannot_be_watched(sandbox, home):
    watch = Watch()
    with pytest.raises(FileNotFoundException):
        await sandbox.files.watch_dir(f"{home}/none", watch.on_event)
    with pytest.raises(InvalidArgumentException):
        await sandbox.files.watch_dir("/etc/hostname", watch.on_event)


@in_a_loop
async def test_terminal(sandbox, home):
    shown, news = bytearray(), asyncio.Condition()

    async def on_data(data):
        async with news:
            shown.extend(data)
            news.notify_all()

    async def until(text):
        async with news:
            await news.wait_for(lambda: text in shown)

    terminal = await sandbox.pty.create(PtySize(rows=24, cols=80), on_data=on_data, cwd=home)
    await sandbox.pty.send_stdin(terminal.pid, b"stty size; pwd\n")
    await until(b"24 80\r\n" + home.encode() + b"\r\n")
    await sandbox.pty.resize(terminal.pid, PtySize(rows=43, cols=132))
    await sandbox.pty.send_stdin(terminal.pid, b"stty size; MARK=still\n")
    await until(b"43 132\r\n")
    await terminal.disconnect()
    again = await sandbox.pty.connect(terminal.pid, on_data=on_data)
    await sandbox.pty.send_stdin(terminal.pid, b"echo $MARK-here\n")
    await until(b"still-here\r\n")
    assert await sandbox.pty.kill(terminal.pid)
    with pytest.raises(CommandExitException):
        await again.wait()
    assert not await sandbox.pty.kill(terminal.pid)

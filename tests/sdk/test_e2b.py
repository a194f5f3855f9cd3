"""The published `e2b` package, unmodified, straight at one envd: its debug mode (E2B_DEBUG and E2B_SANDBOX_URL in the environment)."""

import io
import os
import re
import threading
import time

import httpx
import pytest
from e2b import (
    AuthenticationException,
    CommandExitException,
    FileNotFoundException,
    FileType,
    FilesystemEventType,
    InvalidArgumentException,
    NotEnoughSpaceException,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxException,
    TimeoutException,
)

CREATE, CHMOD, WRITE = FilesystemEventType.CREATE, FilesystemEventType.CHMOD, FilesystemEventType.WRITE
REMOVE, RENAME = FilesystemEventType.REMOVE, FilesystemEventType.RENAME


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox.create()


@pytest.fixture
def home(sandbox, request):
    """A directory of the test's own."""
    path = f"/home/user/{request.node.name.translate(str.maketrans('[]/', '---'))}"
    assert sandbox.files.make_dir(path)
    return path


def until(condition):
    limit = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < limit, "it did not come about"
        time.sleep(0.01)
    return value


def pids(sandbox):
    return [process.pid for process in sandbox.commands.list()]


# Commands


def test_is_running(sandbox):
    assert sandbox.is_running()


def test_run(sandbox):
    result = sandbox.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code, result.error) == ("out\n", "err\n", 0, None)


def test_run_that_fails(sandbox):
    with pytest.raises(CommandExitException) as failure:
        sandbox.commands.run("echo out; echo err >&2; exit 3")
    assert (failure.value.stdout, failure.value.stderr, failure.value.exit_code) == ("out\n", "err\n", 3)


def test_default_user(sandbox):
    assert sandbox.commands.run("id -un; pwd; echo $HOME $USER $LOGNAME").stdout == "user\n/home/user\n/home/user user user\n"


def test_another_user(sandbox):
    assert sandbox.commands.run("id -un; pwd; echo $HOME", user="root").stdout == "root\n/root\n/root\n"


def test_unknown_user(sandbox):
    with pytest.raises(AuthenticationException, match="invalid username: 'root123'"):
        sandbox.commands.run("whoami", user="root123")


def test_environment(sandbox):
    result = sandbox.commands.run('echo "$GREETING|$EMPTY|"', envs={"GREETING": "ça va? \"$HOME\"", "EMPTY": ""})
    assert result.stdout == 'ça va? "$HOME"||\n'


def test_directory(sandbox, home):
    assert sandbox.commands.run("pwd", cwd=home).stdout == f"{home}\n"
    # A relative one is below the user's home.
    assert sandbox.commands.run("pwd", cwd=os.path.basename(home)).stdout == f"{home}\n"
    with pytest.raises(InvalidArgumentException, match="/no/such/place"):
        sandbox.commands.run("pwd", cwd="/no/such/place")


def test_output_callbacks(sandbox):
    out, err = [], []
    result = sandbox.commands.run("for i in 1 2 3; do echo $i; echo e$i >&2; done", on_stdout=out.append, on_stderr=err.append)
    assert "".join(out) == result.stdout == "1\n2\n3\n"
    assert "".join(err) == result.stderr == "e1\ne2\ne3\n"


def test_output_not_retained(sandbox):
    out = []
    result = sandbox.commands.run("seq 1000", on_stdout=out.append, retain_output=False)
    assert result.stdout is None and "".join(out) == "".join(f"{n}\n" for n in range(1, 1001))


def test_output_that_is_no_text(sandbox):
    assert sandbox.commands.run(r"printf 'a\377b\000c'").stdout == "a\ufffdb\0c"


def test_character_cut_by_the_end(sandbox):
    assert sandbox.commands.run(r"head -c 8191 /dev/zero | tr '\0' a; printf '\342'").stdout == "a" * 8191 + "\ufffd"


def test_characters_across_chunks(sandbox):
    # Three bytes each: no chunk size is a multiple of it, so characters are cut by chunks.
    result = sandbox.commands.run("python3 -c 'print(\"\\u20ac\" * 300001, end=\"\")'")
    assert result.stdout == "\u20ac" * 300001


def test_large_output(sandbox):
    result = sandbox.commands.run("seq 1000000")
    assert result.stdout == "".join(f"{n}\n" for n in range(1, 1000001))


def test_timeout_ends_the_command(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 4321 & sleep 4321", timeout=1)
    # The shell's group goes with it.
    until(lambda: sandbox.commands.run("pgrep -fxc 'sleep 4321' || true").stdout == "0\n")


def test_background(sandbox):
    handle = sandbox.commands.run("echo before; read line; echo got $line", background=True, stdin=True)
    listed = next(process for process in sandbox.commands.list() if process.pid == handle.pid)
    assert (listed.cmd, listed.args) == ("/bin/bash", ["-l", "-c", "echo before; read line; echo got $line"])
    handle.send_stdin("hello\n")
    assert handle.wait().stdout == "before\ngot hello\n"
    assert handle.pid not in pids(sandbox)


def test_kill(sandbox):
    handle = sandbox.commands.run("sleep 4321", background=True)
    assert handle.kill()
    with pytest.raises(CommandExitException) as end:
        handle.wait()
    assert end.value.exit_code != 0 and "kill" in end.value.error
    assert handle.pid not in pids(sandbox)
    assert not sandbox.commands.kill(handle.pid)


def test_stdin_until_its_end(sandbox):
    handle = sandbox.commands.run("cat; echo done", background=True, stdin=True)
    sandbox.commands.send_stdin(handle.pid, "text ")
    sandbox.commands.send_stdin(handle.pid, b"and bytes\n")
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "text and bytes\ndone\n"


def test_stream_input(sandbox):
    handle = sandbox.commands.run("sha256sum", background=True, stdin=True)
    sandbox.commands.stream_input(handle.pid, (f"{n:07}\n" for n in range(20000)))
    handle.close_stdin()
    expected = sandbox.commands.run("seq -f %07.0f 0 19999 | sha256sum").stdout
    assert handle.wait().stdout == expected


def test_no_stdin(sandbox):
    assert sandbox.commands.run("cat", stdin=False).stdout == ""


def test_input_for_nobody(sandbox):
    with pytest.raises(NotFoundException):
        sandbox.commands.send_stdin(4194303, "x")
    with pytest.raises(NotFoundException):
        sandbox.commands.stream_input(4194303, ["x"])


def test_connect(sandbox):
    started = sandbox.commands.run("read line; echo got $line; exit 4", background=True, stdin=True)
    started.disconnect()
    assert started.pid in pids(sandbox)
    again = sandbox.commands.connect(started.pid)
    again.send_stdin("more\n")
    with pytest.raises(CommandExitException) as end:
        again.wait()
    assert (end.value.stdout, end.value.exit_code) == ("got more\n", 4)


def test_connect_to_what_just_ended(sandbox):
    handle = sandbox.commands.run("echo last words; exit 5", background=True)
    until(lambda: handle.pid not in pids(sandbox))
    with pytest.raises(CommandExitException) as end:
        sandbox.commands.connect(handle.pid).wait()
    assert (end.value.stdout, end.value.exit_code) == ("last words\n", 5)


def test_connect_to_nobody(sandbox):
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(4194303)


def test_timeout_of_a_connection_ends_only_it(sandbox):
    handle = sandbox.commands.run("read line; echo $line", background=True, stdin=True)
    with pytest.raises(TimeoutException):
        sandbox.commands.connect(handle.pid, timeout=3).wait()
    handle.send_stdin("alive\n")
    assert handle.wait().stdout == "alive\n"


def test_many_at_once(sandbox):
    results = [None] * 32

    def run(index):
        results[index] = sandbox.commands.run(f"echo {index}; seq 2000 | tail -n 1").stdout

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(results))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == [f"{index}\n2000\n" for index in range(len(results))]


# Files


@pytest.mark.parametrize("octets", [False, True])
def test_write_and_read(sandbox, home, octets):
    for content in ["", "hello\n", "ça va? \u20ac\U0001f600", "x" * 1_000_000, "short again"]:
        info = sandbox.files.write(f"{home}/file", content, use_octet_stream=octets)
        assert (info.name, info.path, info.type) == ("file", f"{home}/file", FileType.FILE)
        assert sandbox.files.read(f"{home}/file") == content
    data = bytes(range(256)) * 5000
    sandbox.files.write(f"{home}/file", data, use_octet_stream=octets)
    assert sandbox.files.read(f"{home}/file", format="bytes") == data
    with sandbox.files.read(f"{home}/file", format="stream") as stream:
        assert b"".join(stream) == data
    assert sandbox.commands.run("stat -c '%U %G %a %s' file", cwd=home).stdout == f"user user 644 {len(data)}\n"


def test_write_from_streams(sandbox, home):
    data = os.urandom(3_000_000)
    sandbox.files.write(f"{home}/binary", io.BytesIO(data))
    sandbox.files.write(f"{home}/text", io.StringIO("ça va\n" * 100000))
    sandbox.files.write(f"{home}/chunks", (data[at : at + 10007] for at in range(0, len(data), 10007)))
    assert sandbox.files.read(f"{home}/binary", format="bytes") == data
    assert sandbox.files.read(f"{home}/text") == "ça va\n" * 100000
    assert sandbox.files.read(f"{home}/chunks", format="bytes") == data


def test_gzip_both_ways(sandbox, home):
    data = b"much of the same " * 100000 + os.urandom(1000)
    sandbox.files.write(f"{home}/file", data, gzip=True)
    assert sandbox.files.read(f"{home}/file", format="bytes", gzip=True) == data
    assert sandbox.files.read(f"{home}/file", format="bytes") == data
    with sandbox.files.read(f"{home}/file", format="stream", gzip=True) as stream:
        assert b"".join(stream) == data
    sandbox.files.write(f"{home}/chunks", iter([data, data]), gzip=True)
    assert sandbox.files.read(f"{home}/chunks", format="bytes") == data + data


def test_write_makes_parents(sandbox, home):
    sandbox.files.write(f"{home}/a/b/c/file", "deep")
    assert sandbox.commands.run("stat -c '%U %a' a a/b a/b/c a/b/c/file", cwd=home).stdout == "user 755\n" * 3 + "user 644\n"


def test_relative_paths_are_below_home(sandbox, home):
    name = os.path.basename(home)
    assert sandbox.files.write(f"{name}/file", "x").path == f"{home}/file"
    assert sandbox.files.read(f"~/{name}/file") == "x"
    assert sandbox.files.get_info(f"{name}/file").path == f"{home}/file"


def test_write_files(sandbox, home):
    assert sandbox.files.write_files([]) == []
    files = [{"path": f"{home}/{n}/file", "data": f"content {n}"} for n in range(20)]
    for octets in (False, True):
        infos = sandbox.files.write_files(files, use_octet_stream=octets)
        assert [info.path for info in infos] == [file["path"] for file in files]
        assert all(sandbox.files.read(file["path"]) == file["data"] for file in files)
        sandbox.files.remove(home)


def test_files_of_another_user(sandbox):
    sandbox.files.write("/root/secret", "s", user="root")
    assert sandbox.files.read("/root/secret", user="root") == "s"
    assert sandbox.files.get_info("/root/secret", user="root").owner == "root"
    sandbox.files.remove("/root/secret", user="root")
    with pytest.raises(AuthenticationException):
        sandbox.files.read("/etc/hostname", user="nobody123")


def test_read_what_is_not_there(sandbox, home):
    for format in ("text", "bytes", "stream"):
        with pytest.raises(FileNotFoundException):
            sandbox.files.read(f"{home}/none", format=format)
    with pytest.raises(InvalidArgumentException):
        sandbox.files.read(home)


def test_write_over_a_directory(sandbox, home):
    with pytest.raises(SandboxException):
        sandbox.files.write(home, "x")
    assert sandbox.files.get_info(home).type == FileType.DIR


def test_disk_full(sandbox):
    for octets in (False, True):
        with pytest.raises(NotEnoughSpaceException):
            sandbox.files.write("/mnt/large", b"x" * (2 << 20), use_octet_stream=octets)
        assert sandbox.files.list("/mnt") == []
    sandbox.files.write("/mnt/small", "fits")
    assert sandbox.files.read("/mnt/small") == "fits"
    sandbox.files.remove("/mnt/small")


def test_list(sandbox, home):
    sandbox.commands.run("mkdir -p a/b/c z; echo 1 > a/1; echo 2 > a/b/2; echo 3 > a/b/c/3; touch file", cwd=home)
    names = lambda depth: [os.path.relpath(entry.path, home) for entry in sandbox.files.list(home, depth=depth)]
    assert names(1) == ["a", "file", "z"]
    assert names(2) == ["a", "a/1", "a/b", "file", "z"]
    assert names(4) == ["a", "a/1", "a/b", "a/b/2", "a/b/c", "a/b/c/3", "file", "z"]
    assert [(entry.name, entry.type) for entry in sandbox.files.list(home)] == [("a", FileType.DIR), ("file", FileType.FILE), ("z", FileType.DIR)]
    with pytest.raises(InvalidArgumentException):
        sandbox.files.list(home, depth=0)
    with pytest.raises(FileNotFoundException):
        sandbox.files.list(f"{home}/none")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.list(f"{home}/file")


def test_info(sandbox, home):
    sandbox.commands.run("echo 12345 > file; chmod 4751 file; touch -d @1700000000.25 file; ln -s file link; ln -s none broken", cwd=home)
    info = sandbox.files.get_info(f"{home}/file")
    assert (info.name, info.path, info.type, info.size) == ("file", f"{home}/file", FileType.FILE, 6)
    assert (info.mode & 0o7777, info.owner, info.group) == (0o4751, "user", "user")
    assert info.modified_time.timestamp() == 1700000000.25
    assert info.symlink_target is None and info.metadata is None
    link = sandbox.files.get_info(f"{home}/link")
    assert (link.name, link.symlink_target) == ("link", f"{home}/file")
    assert "broken" in [entry.name for entry in sandbox.files.list(home)]
    assert sandbox.files.get_info(home).type == FileType.DIR
    with pytest.raises(FileNotFoundException):
        sandbox.files.get_info(f"{home}/none")


def test_exists(sandbox, home):
    sandbox.files.write(f"{home}/file", "")
    assert sandbox.files.exists(home) and sandbox.files.exists(f"{home}/file")
    assert not sandbox.files.exists(f"{home}/none") and not sandbox.files.exists(f"{home}/none/none")


def test_make_dir(sandbox, home):
    assert sandbox.files.make_dir(f"{home}/a/b/c")
    assert not sandbox.files.make_dir(f"{home}/a/b/c")
    assert sandbox.commands.run("stat -c '%U %a' a a/b a/b/c", cwd=home).stdout == "user 755\n" * 3
    sandbox.files.write(f"{home}/file", "")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.make_dir(f"{home}/file")


def test_rename(sandbox, home):
    sandbox.files.write(f"{home}/old", "content")
    info = sandbox.files.rename(f"{home}/old", f"{home}/new/place/file")
    assert (info.name, info.path) == ("file", f"{home}/new/place/file")
    assert not sandbox.files.exists(f"{home}/old") and sandbox.files.read(info.path) == "content"
    sandbox.files.rename(f"{home}/new", f"{home}/moved")
    assert sandbox.files.read(f"{home}/moved/place/file") == "content"
    with pytest.raises(FileNotFoundException):
        sandbox.files.rename(f"{home}/none", f"{home}/other")


def test_remove(sandbox, home):
    sandbox.commands.run("mkdir -p a/b; touch a/b/file file; ln -s a link", cwd=home)
    for name in ("file", "link", "a", "never was"):
        sandbox.files.remove(f"{home}/{name}")
    assert sandbox.files.list(home) == []


def test_metadata(sandbox, home):
    for octets in (False, True):
        info = sandbox.files.write(f"{home}/file", "x", metadata={"Author": "me & you", "purpose": "test"}, use_octet_stream=octets)
        expected = {"author": "me & you", "purpose": "test"}
        assert info.metadata == sandbox.files.get_info(f"{home}/file").metadata == expected
        assert [entry.metadata for entry in sandbox.files.list(home)] == [expected]
        # It comes along, and each upload replaces all of it.
        assert sandbox.files.rename(f"{home}/file", f"{home}/renamed").metadata == expected
        sandbox.files.rename(f"{home}/renamed", f"{home}/file")
        assert sandbox.files.write(f"{home}/file", "x", metadata={"other": "1"}).metadata == {"other": "1"}
        assert sandbox.files.get_info(f"{home}/file").metadata == {"other": "1"}
        sandbox.files.write(f"{home}/file", "x")
        assert sandbox.files.get_info(f"{home}/file").metadata is None


def test_urls_without_a_token(sandbox, home):
    with open(__file__, "rb") as this:
        content = this.read()
    assert httpx.post(sandbox.upload_url(f"{home}/file"), files={"file": ("ignored", content)}).status_code == 200
    url = sandbox.download_url(f"{home}/file")
    answer = httpx.get(url)
    assert (answer.status_code, answer.content) == (200, content)
    part = httpx.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"


# Watching


def drained(watch, last):
    """Every event up to one whose name is `last`."""
    events = []
    until(lambda: events.extend(watch.get_new_events()) or any(event.name == last for event in events))
    return [(event.name, event.type) for event in events]


@pytest.mark.parametrize("octets", [False, True])
def test_an_upload_is_three_events(sandbox, home, octets):
    watch = sandbox.files.watch_dir(home)
    sandbox.files.write(f"{home}/file", "content", use_octet_stream=octets)
    sandbox.commands.run("mkdir last", cwd=home)
    assert drained(watch, "last") == [("file", CREATE), ("file", CHMOD), ("file", WRITE), ("last", CREATE)]
    assert watch.get_new_events() == []
    watch.stop()
    with pytest.raises(SandboxException):
        watch.get_new_events()


def test_watched_events(sandbox, home):
    sandbox.commands.run("touch old; mkdir sub", cwd=home)
    watch = sandbox.files.watch_dir(home)
    sandbox.commands.run("echo x >> old; chmod 600 old; mv old new; touch sub/unseen; rm new; mkdir last", cwd=home)
    expected = [("old", WRITE), ("old", CHMOD), ("old", RENAME), ("new", CREATE), ("new", REMOVE), ("last", CREATE)]
    assert drained(watch, "last") == expected
    watch.stop()


def test_recursive_watch(sandbox, home):
    sandbox.commands.run("mkdir -p a/b", cwd=home)
    watch = sandbox.files.watch_dir(home, recursive=True)
    sandbox.files.write(f"{home}/a/b/file", "content")
    sandbox.commands.run("mkdir between", cwd=home)
    assert drained(watch, "between") == [("a/b/file", CREATE), ("a/b/file", CHMOD), ("a/b/file", WRITE), ("between", CREATE)]
    # Directories that come later are watched too.
    sandbox.files.write(f"{home}/between/file", "content")
    sandbox.commands.run("rm -r a; mkdir last", cwd=home)
    events = drained(watch, "last")
    assert events[:3] == [("between/file", CREATE), ("between/file", CHMOD), ("between/file", WRITE)]
    assert events[3:] == [("a/b/file", REMOVE), ("a/b", REMOVE), ("a", REMOVE), ("last", CREATE)]
    watch.stop()


def test_what_a_new_directory_holds_is_seen(sandbox, home):
    watch = sandbox.files.watch_dir(home, recursive=True)
    # All at once: files are there before anybody can watch their directory.
    sandbox.commands.run("for i in $(seq 50); do mkdir -p d$i/e/f; echo x > d$i/e/f/file; done; mkdir last", cwd=home)
    names = {name for name, kind in drained(watch, "last")}
    expected = {f"d{i}{rest}" for i in range(1, 51) for rest in ("", "/e", "/e/f", "/e/f/file")} | {"last"}
    assert names == expected
    watch.stop()


def test_watch_during_a_clone(sandbox, home):
    make = """git init -q origin && cd origin && mkdir -p {a,b,c}/{1..10} && for d in */*; do seq 20 > $d/file; touch $d/x{1..20}; done
        git add . && git -c user.name=t -c user.email=t@example.com commit -qm all && mkdir ../in"""
    sandbox.commands.run(make, cwd=home)
    watch = sandbox.files.watch_dir(f"{home}/in", recursive=True)
    sandbox.commands.run("git clone -q ../origin work && mkdir last", cwd=f"{home}/in")
    events = drained(watch, "last")
    created = {name for name, kind in events if kind == CREATE}
    assert created >= set(sandbox.commands.run("find work -not -path '*/.git/*'", cwd=f"{home}/in").stdout.splitlines())
    # What git makes and takes away again is told both ways.
    removed = {name for name, kind in events if kind in (REMOVE, RENAME)}
    exists = set(sandbox.commands.run("find . -mindepth 1 -printf '%P\\n'", cwd=f"{home}/in").stdout.splitlines())
    assert created - exists <= removed
    watch.stop()


def test_watch_with_entries(sandbox, home):
    watch = sandbox.files.watch_dir(home, include_entry=True)
    sandbox.files.write(f"{home}/file", "content")
    events = []
    until(lambda: events.extend(watch.get_new_events()) or len(events) >= 3)
    assert [(event.entry.path, event.entry.type, event.entry.owner) for event in events[2:]] == [(f"{home}/file", FileType.FILE, "user")]
    assert events[2].entry.size == 7
    sandbox.files.remove(f"{home}/file")
    removed = until(watch.get_new_events)
    assert [(event.name, event.type, event.entry) for event in removed] == [("file", REMOVE, None)]
    watch.stop()


def test_two_watches_do_not_share_events(sandbox, home):
    first, second = sandbox.files.watch_dir(home), sandbox.files.watch_dir(home)
    sandbox.commands.run("mkdir last", cwd=home)
    assert drained(first, "last") == drained(second, "last") == [("last", CREATE)]
    first.stop()
    sandbox.commands.run("mkdir later", cwd=home)
    assert drained(second, "later") == [("later", CREATE)]
    second.stop()


def test_what_cannot_be_watched(sandbox, home):
    sandbox.files.write(f"{home}/file", "")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.watch_dir(f"{home}/file")
    with pytest.raises(FileNotFoundException):
        sandbox.files.watch_dir(f"{home}/none")


# Terminals


def finished(terminal):
    """All that it showed, and how it ended."""
    shown = []
    with pytest.raises(CommandExitException) as end:
        terminal.wait(on_pty=shown.append)
    return b"".join(shown).decode(), end.value.exit_code


def test_terminal(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    sandbox.pty.send_stdin(terminal.pid, b"stty size; id -un; pwd; echo $TERM $LANG; tty; exit 3\n")
    shown, code = finished(terminal)
    assert code == 3
    for expected in ("24 80\r\n", "user\r\n", "/home/user\r\n", "xterm-256color C.UTF-8\r\n", "/dev/pts/"):
        assert expected in shown, shown


def test_terminal_of_another(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=10, cols=20), user="root", cwd="/etc", envs={"TERM": "vt100", "MARK": "here"})
    sandbox.pty.send_stdin(terminal.pid, b'echo "<$(id -un)> <$PWD> <$TERM> <$MARK>"; exit 1\n')
    shown, _ = finished(terminal)
    assert "<root> </etc> <vt100> <here>" in shown.replace("\r\n", "").replace("\r", ""), shown


def test_terminal_resized(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    sandbox.pty.resize(terminal.pid, PtySize(rows=43, cols=132))
    sandbox.pty.send_stdin(terminal.pid, b"stty size; exit 1\n")
    assert "43 132\r\n" in finished(terminal)[0]


def test_terminal_left_and_found_again(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    sandbox.pty.send_stdin(terminal.pid, b"MARK=still; cat <<< ready-$((1+1))\n")
    shown = b""
    for _, _, data in terminal:
        shown += data
        if b"ready-2" in shown:
            break
    terminal.disconnect()
    again = sandbox.pty.connect(terminal.pid)
    assert again.pid == terminal.pid
    sandbox.pty.send_stdin(terminal.pid, b"echo $MARK-here; exit 2\n")
    shown, code = finished(again)
    assert "still-here\r\n" in shown and code == 2


def test_terminal_killed(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    assert terminal.pid in pids(sandbox)
    assert sandbox.pty.kill(terminal.pid)
    assert finished(terminal)[1] != 0
    assert not sandbox.pty.kill(terminal.pid)
    assert terminal.pid not in pids(sandbox)
    with pytest.raises(NotFoundException):
        sandbox.pty.connect(4194303)


def test_terminal_input_streamed(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    sandbox.pty.stream_input(terminal.pid, [f"echo $(({n} * 1000))\n" for n in range(1, 51)] + ["exit 1\n"])
    shown, _ = finished(terminal)
    # Output is what stands alone on a line; bash says around it that a paste would be bracketed.
    assert re.findall(r"\r(?:\n)?(\d+)\r\n", shown) == [str(n * 1000) for n in range(1, 51)], shown

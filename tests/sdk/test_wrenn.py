"""The published `wrenn` package, unmodified, against a running Wrenn (WRENN_BASE_URL and WRENN_API_KEY in the environment)."""

import asyncio

import pytest
from wrenn import AsyncCapsule, Capsule
from wrenn.client import WrennClient
from wrenn.exceptions import WrennAuthenticationError, WrennNotFoundError, WrennValidationError


@pytest.fixture(scope="module")
def capsule():
    with Capsule() as capsule:
        yield capsule


def test_quick_start_of_the_readme():
    with Capsule(template="minimal") as capsule:
        assert capsule.commands.run("echo hello").stdout == "hello\n"


def test_python_runs():
    capsule = Capsule()
    try:
        assert capsule.commands.run("python3 -c 'print(6*7)'").stdout == "42\n"
    finally:
        capsule.destroy()


def test_create_waits_for_running():
    capsule = Capsule(wait=True)
    assert capsule.is_running()
    capsule.destroy(wait=True)


def test_exit_code_and_both_streams(capsule):
    result = capsule.commands.run("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)


def test_environment_and_directory(capsule):
    result = capsule.commands.run("echo $GREETING; pwd", envs={"GREETING": "hello"}, cwd="/usr/lib")
    assert result.stdout == "hello\n/usr/lib\n"


def test_default_user_and_home(capsule):
    assert capsule.commands.run("id -un; pwd; echo $HOME").stdout == "root\n/root\n/root\n"


def test_output_that_is_no_text(capsule):
    assert capsule.commands.run("printf 'a\\377b'").stdout == "a\ufffdb"


def test_background_command(capsule):
    handle = capsule.commands.run("sleep 60", background=True, tag="sleeper")
    assert handle.pid > 1 and handle.tag == "sleeper"


def test_limits_name_the_field():
    with WrennClient() as client:
        for field, value in [("vcpus", 0), ("vcpus", 10**9), ("memory_mb", 1), ("timeout_sec", -1)]:
            with pytest.raises(WrennValidationError, match=field):
                client.capsules.create(**{field: value})


def test_unknown_things_are_not_found():
    with WrennClient() as client:
        with pytest.raises(WrennNotFoundError):
            client.capsules.get("cl-0000000000000000000000000")
        with pytest.raises(WrennNotFoundError):
            client.capsules.create(template="no-such-template")
        with pytest.raises(WrennValidationError):
            client.capsules.get("cl-zzzzzzzzzzzzzzzzzzzzzzzzz")


def test_wrong_key():
    with WrennClient(api_key="wrn_00000000000000000000000000000000") as client:
        with pytest.raises(WrennAuthenticationError):
            client.capsules.list()


def test_list_get_ping_and_destroy_twice():
    with WrennClient() as client:
        made = client.capsules.create(template="minimal-ubuntu")
        assert made.id in [capsule.id for capsule in client.capsules.list()]
        client.capsules.ping(made.id)
        assert client.capsules.get(made.id).metadata["envd_version"]
        client.capsules.destroy(made.id)
        client.capsules.destroy(made.id)
        assert made.id not in [capsule.id for capsule in client.capsules.list()]


def test_async_client():
    async def run():
        async with await AsyncCapsule.create() as capsule:
            results = await asyncio.gather(*(capsule.commands.run(f"echo {n}") for n in range(5)))
            return [result.stdout for result in results]

    assert asyncio.run(run()) == [f"{n}\n" for n in range(5)]


def shown_until_exit(term):
    shown = b""
    for event in term:
        if event.type == "output":
            shown += event.data
        elif event.type == "exit":
            return shown, event.exit_code
        else:
            assert event.type in ("started", "ping"), event
    raise AssertionError(f"no exit after {shown}")


def test_terminal(capsule):
    with capsule.pty(cols=100, rows=30, envs={"GREETING": "hello"}, cwd="/usr/lib") as term:
        term.write(b"stty size; echo $GREETING; pwd; exit 7\n")
        shown, exit_code = shown_until_exit(term)
        assert exit_code == 7 and term.pid > 1 and term.tag.startswith("pty-")
        for line in (b"30 100\r\n", b"hello\r\n", b"/usr/lib\r\n"):
            assert line in shown


def test_terminal_is_found_again(capsule):
    with capsule.pty(cmd="/bin/sh") as term:
        assert next(iter(term)).type == "started"
        term.write(b"MARK=still-here\n")
        tag, pid = term.tag, term.pid
    with capsule.pty_connect(tag) as term:
        assert next(iter(term)).type == "started" and term.pid == pid
        term.resize(132, 43)
        term.write(b"stty size; echo $MARK; exit 0\n")
        shown, exit_code = shown_until_exit(term)
        assert exit_code == 0 and b"43 132\r\n" in shown and b"still-here\r\n" in shown


def test_terminal_is_killed(capsule):
    with capsule.pty(cmd="/bin/sleep", args=["60"]) as term:
        assert next(iter(term)).type == "started"
        term.kill()
        assert shown_until_exit(term)[1] == -1


def test_async_terminal():
    async def run():
        async with await AsyncCapsule.create() as capsule:
            async with capsule.pty() as term:
                await term.write(b"exit 9\n")
                return [event.exit_code async for event in term if event.type == "exit"]

    assert asyncio.run(run()) == [9]

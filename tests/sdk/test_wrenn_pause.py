"""Pausing, resuming, connecting and templates with the published `wrenn` package, unmodified, against a running Wrenn."""

import asyncio
import uuid

import pytest
from wrenn import AsyncCapsule, Capsule
from wrenn.client import WrennClient
from wrenn.exceptions import WrennConflictError, WrennForbiddenError, WrennNotFoundError, WrennValidationError

COUNT = "n=0; while true; do n=$((n+1)); echo $n > /root/count; sleep 0.1; done"


@pytest.fixture
def capsule():
    with Capsule(wait=True) as capsule:
        yield capsule


@pytest.fixture
def client():
    with WrennClient() as client:
        yield client


@pytest.fixture
def name(client):
    name = f"sdk-{uuid.uuid4().hex}"
    yield name
    try:
        client.snapshots.delete(name)
    except WrennNotFoundError:
        pass


def status(client, capsule):
    return client.capsules.get(capsule.capsule_id).status.value


def test_it_goes_on_where_it_was(client, capsule):
    handle = capsule.commands.run(COUNT, background=True, tag="counter")
    capsule.files.write("/root/kept", b"\x00\xff")
    for _ in range(2):
        capsule.pause(wait=True)
        assert status(client, capsule) == "paused"
        capsule.resume(wait=True)
        assert status(client, capsule) == "running"
        assert handle.pid in [process.pid for process in capsule.commands.list()]
        assert capsule.files.read_bytes("/root/kept") == b"\x00\xff"
    before = int(capsule.commands.run("cat /root/count").stdout)
    assert int(capsule.commands.run("sleep 1; cat /root/count").stdout) > before


def test_what_is_so_already_is_a_success(client, capsule):
    capsule.resume(wait=True)
    capsule.pause(wait=True)
    capsule.pause(wait=True)
    assert status(client, capsule) == "paused"


def test_a_paused_capsule_is_not_used(capsule):
    capsule.pause(wait=True)
    with pytest.raises(WrennConflictError, match="paused"):
        capsule.commands.run("true")
    with pytest.raises(WrennConflictError, match="paused"):
        capsule.ping()


def test_connect_resumes(capsule):
    capsule.commands.run("echo hello > /root/kept")
    capsule.pause(wait=True)
    connected = Capsule.connect(capsule.capsule_id)
    assert connected.is_running()
    assert connected.commands.run("cat /root/kept").stdout == "hello\n"


def test_connect_while_it_is_paused(capsule):
    capsule.pause()
    assert Capsule.connect(capsule.capsule_id).commands.run("echo here").stdout == "here\n"


def test_destroy_while_paused(client):
    capsule = Capsule(wait=True)
    capsule.pause(wait=True)
    capsule.destroy(wait=True)
    assert status(client, capsule) == "stopped"


def test_a_template(client, capsule, name):
    capsule.commands.run("echo from the template > /root/kept")
    template = capsule.create_snapshot(name=name)
    assert (template.name, template.type.value, template.platform, template.protected) == (name, "snapshot", False, False)
    assert capsule.is_running()
    assert name in [listed.name for listed in client.snapshots.list(type="snapshot")]
    assert name not in [listed.name for listed in client.snapshots.list(type="base")]
    with pytest.raises(WrennConflictError):
        capsule.create_snapshot(name=name)
    capsule.create_snapshot(name=name, overwrite=True)

    with Capsule(template=name, wait=True) as made:
        assert made.commands.run("cat /root/kept").stdout == "from the template\n"
        client.snapshots.delete(name)
        assert made.commands.run("echo still here").stdout == "still here\n"
    with pytest.raises(WrennNotFoundError):
        Capsule(template=name)


def test_templates_have_their_sizes(client, capsule, name):
    capsule.create_snapshot(name=name)
    with pytest.raises(WrennValidationError, match="memory_mb"):
        Capsule(template=name, memory_mb=2048)


def test_the_platforms_templates_stay(client, capsule):
    with pytest.raises(WrennForbiddenError):
        client.snapshots.delete("minimal-ubuntu")
    with pytest.raises(WrennConflictError):
        capsule.create_snapshot(name="minimal", overwrite=True)


def test_asynchronously():
    async def run():
        capsule = await AsyncCapsule.create(wait=True)
        try:
            await capsule.pause(wait=True)
            connected = await AsyncCapsule.connect(capsule.capsule_id)
            return (await connected.commands.run("echo hello")).stdout
        finally:
            await capsule.destroy()

    assert asyncio.run(run()) == "hello\n"

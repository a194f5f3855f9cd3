"""The published `wrenn` and `e2b` packages, unmodified, over https with an authority that only SSL_CERT_FILE names (CA_PEM in the
environment, with WRENN_BASE_URL, WRENN_API_KEY, DOMAIN, and ENVD_TOKEN of CAPSULE, in which app.py runs on port 8000)."""

import os
import socket
import ssl
import tempfile

ca = tempfile.NamedTemporaryFile("w", suffix=".pem")
ca.write(os.environ["CA_PEM"])
ca.flush()
os.environ["SSL_CERT_FILE"] = ca.name

DOMAIN = os.environ["DOMAIN"]
resolve = socket.getaddrinfo


def here(host, *rest, **named):
    """Names below the domain lead to this machine, as they do where a resolver knows of them."""
    name = host.decode() if isinstance(host, bytes) else host
    return resolve("127.0.0.1" if name and name.endswith(DOMAIN.split(":")[0]) else host, *rest, **named)


socket.getaddrinfo = here

import httpx
import httpx_ws
import pytest
from e2b import AuthenticationException, Sandbox
from e2b.connection_config import ConnectionConfig
from packaging.version import Version
from wrenn import Capsule

CAPSULE, TOKEN = os.environ["CAPSULE"], os.environ["ENVD_TOKEN"]


def test_the_address_is_https():
    assert os.environ["WRENN_BASE_URL"].startswith("https://")


def test_wrenn():
    with Capsule() as capsule:
        assert capsule.commands.run("echo out; exit 3").exit_code == 3
        events = list(capsule.commands.stream("echo one; echo two"))
        assert [event.type for event in events][0] == "start"
        assert "".join(event.data for event in events if event.type == "stdout") == "one\ntwo\n"
        capsule.files.write("/tmp/f", b"x" * 3_000_000)
        assert capsule.files.read_bytes("/tmp/f") == b"x" * 3_000_000
        with capsule.pty(cmd="/bin/sh", envs={"PS1": "> "}) as term:
            term.write(b"exit 5\n")
            assert [event for event in term][-1].exit_code == 5


def sandbox(token, monkeypatch):
    monkeypatch.setenv("E2B_DEBUG", "true")
    monkeypatch.setenv("E2B_SANDBOX_URL", f"https://49983-{CAPSULE}.{DOMAIN}")
    headers = {"X-Access-Token": token} if token else {}
    return Sandbox(
        sandbox_id="sandbox",
        sandbox_domain=None,
        envd_version=Version("0.6.13"),
        envd_access_token=token,
        traffic_access_token=None,
        connection_config=ConnectionConfig(extra_sandbox_headers=headers),
    )


def test_e2b(monkeypatch):
    box = sandbox(TOKEN, monkeypatch)
    assert box.is_running()
    assert box.commands.run("echo $((40 + 2))").stdout == "42\n"
    box.files.write("/tmp/e2b", "content")
    assert box.files.read("/tmp/e2b") == "content"
    with pytest.raises(AuthenticationException):
        sandbox(None, monkeypatch).commands.run("true")


def test_a_port():
    url = f"https://8000-{CAPSULE}.{DOMAIN}"
    context = ssl.create_default_context()
    with httpx.Client(verify=context) as client:
        assert "x-forwarded-proto: https" in client.get(f"{url}/head").text
        # Where the program leads a visitor, its page is.
        assert client.get(f"{url}/dir", follow_redirects=True).status_code == 200
        # Last: a thread of httpx_ws reads on while its socket is closed, and could take the bytes of one that is opened next.
        with httpx_ws.connect_ws(f"{url}/ws", client) as ws:
            ws.send_text("through wss")
            assert ws.receive_text() == "through wss"


def test_nobody_else_is_trusted(monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(os.environ["WRENN_BASE_URL"] + "/health")

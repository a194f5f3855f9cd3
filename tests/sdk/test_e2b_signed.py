"""The published `e2b` package against an envd that has a token (ENVD_TOKEN): who has it, who has a signed URL, and who has neither."""

import os
import time

import httpx
import pytest
from e2b import AuthenticationException, Sandbox
from e2b.connection_config import ConnectionConfig
from packaging.version import Version

TOKEN = os.environ["ENVD_TOKEN"]


def client(token, version="0.6.13"):
    """What `Sandbox.create` makes of the control plane's answer."""
    headers = {"X-Access-Token": token} if token else {}
    config = ConnectionConfig(extra_sandbox_headers=headers)
    return Sandbox(
        sandbox_id="sandbox",
        sandbox_domain=None,
        envd_version=Version(version),
        envd_access_token=token,
        traffic_access_token=None,
        connection_config=config,
    )


@pytest.fixture(scope="module")
def sandbox():
    return client(TOKEN)


def said(answer):
    return answer.status_code, answer.json()


def test_with_the_token(sandbox):
    assert sandbox.commands.run("id -un").stdout == "user\n"
    sandbox.files.write("/home/user/file", "content")
    assert sandbox.files.read("/home/user/file") == "content"


@pytest.mark.parametrize("token", [None, "another", "a-tokem"])
def test_without_the_token(token):
    sandbox = client(token)
    assert sandbox.is_running()
    for forbidden in (
        lambda: sandbox.commands.run("true"),
        lambda: sandbox.files.list("/"),
        lambda: sandbox.files.read("/etc/hostname"),
        lambda: sandbox.files.write("/home/user/no", "x"),
        lambda: sandbox.pty.kill(1),
    ):
        with pytest.raises(AuthenticationException):
            forbidden()


def test_old_sandboxes_name_their_user():
    sandbox = client(TOKEN, version="0.3.9")
    assert sandbox.commands.run("id -un").stdout == "user\n"
    sandbox.files.write("old", "x")
    assert sandbox.files.get_info("/home/user/old").owner == "user"


@pytest.mark.parametrize("user", [None, "root"])
def test_signed_urls(sandbox, user):
    for path in ("/tmp/sign ed/ça.txt", "relative+file"):
        up = sandbox.upload_url(path, user=user, use_signature_expiration=120)
        assert httpx.post(up, files={"file": ("x", b"content")}).status_code == 200
        for expiration in (None, 120):
            down = httpx.get(sandbox.download_url(path, user=user, use_signature_expiration=expiration))
            assert (down.status_code, down.content) == (200, b"content")
        assert sandbox.files.get_info(path, user=user).owner == (user or "user")
        sandbox.files.remove(path, user=user)


def test_a_signature_is_for_one_thing(sandbox):
    sandbox.files.write("/home/user/file", "content")
    url = httpx.URL(sandbox.download_url("/home/user/file"))
    assert said(httpx.get(url.copy_set_param("path", "/etc/hostname")))[0] == 401
    assert said(httpx.get(url.copy_set_param("username", "root")))[0] == 401
    assert said(httpx.get(url.copy_set_param("signature_expiration", str(int(time.time()) + 60))))[0] == 401
    assert said(httpx.post(url, files={"file": ("x", b"no")}))[0] == 401
    assert said(httpx.get(url.copy_set_param("signature", "v1_no"))) == (401, {"code": 401, "message": "invalid signature"})
    assert said(httpx.get(url.copy_remove_param("signature"))) == (401, {"code": 401, "message": "missing signature query parameter"})
    assert sandbox.files.read("/home/user/file") == "content"


def test_a_signature_ends(sandbox):
    sandbox.files.write("/home/user/file", "content")
    url = sandbox.download_url("/home/user/file", use_signature_expiration=-10)
    assert said(httpx.get(url)) == (401, {"code": 401, "message": "signature is already expired"})
    url = sandbox.upload_url("/home/user/file", use_signature_expiration=-10)
    assert said(httpx.post(url, files={"file": ("x", b"no")})) == (401, {"code": 401, "message": "signature is already expired"})
    assert sandbox.files.read("/home/user/file") == "content"

"""`capsule.git` of the published `wrenn` package, with repositories that are in the capsule."""

import asyncio

import pytest
from wrenn import AsyncCapsule, Capsule
from wrenn._git.exceptions import GitAuthError, GitCommandError

# Answers every request as a server does that wants to know who asks.
LOCKED = """
import http.server
class Locked(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401); self.send_header("WWW-Authenticate", 'Basic realm="locked"'); self.send_header("Content-Length", "0"); self.end_headers()
http.server.HTTPServer(("127.0.0.1", 8418), Locked).serve_forever()
"""


@pytest.fixture(scope="module")
def capsule():
    with Capsule() as capsule:
        capsule.git.configure_user("Tester", "tester@example.com")
        yield capsule


@pytest.fixture
def repo(capsule, request):
    """A clone with one commit of a bare repository beside it."""
    place = f"/root/{request.node.name}"
    git = capsule.git
    git.init(f"{place}/origin.git", bare=True, initial_branch="main")
    git.clone(f"file://{place}/origin.git", f"{place}/work")
    path = f"{place}/work"
    capsule.files.write(f"{path}/file", "one\n")
    git.add(["file"], cwd=path)
    git.commit("first", cwd=path)
    git.push(branch="main", set_upstream=True, cwd=path)
    return path


def lines(capsule, command, cwd):
    return capsule.commands.run(command, cwd=cwd).stdout.splitlines()


def test_status(capsule, repo):
    status = capsule.git.status(cwd=repo)
    assert (status.branch, status.upstream, status.ahead, status.behind, status.files) == ("main", "origin/main", 0, 0, [])
    capsule.files.write(f"{repo}/file", "two\n")
    capsule.files.write(f"{repo}/new ça", "x")
    status = capsule.git.status(cwd=repo)
    assert sorted((file.index_status, file.work_tree_status) for file in status.files) == [(" ", "M"), ("?", "?")]
    capsule.git.add(all=True, cwd=repo)
    capsule.git.commit("second", author_name="Another", author_email="a@example.com", cwd=repo)
    assert capsule.git.status(cwd=repo).ahead == 1
    assert lines(capsule, "git log --format='%an %s'", repo) == ["Another second", "Tester first"]


def test_branches(capsule, repo):
    git = capsule.git
    git.create_branch("topic", cwd=repo)
    assert {branch.name: branch.is_current for branch in git.branches(cwd=repo)} == {"main": False, "topic": True}
    git.commit("empty", allow_empty=True, cwd=repo)
    git.checkout_branch("main", cwd=repo)
    with pytest.raises(GitCommandError):
        git.delete_branch("topic", cwd=repo)
    git.delete_branch("topic", force=True, cwd=repo)
    assert [branch.name for branch in git.branches(cwd=repo)] == ["main"]
    with pytest.raises(GitCommandError):
        git.checkout_branch("none", cwd=repo)


def test_push_and_pull(capsule, repo):
    git, place = capsule.git, repo.removesuffix("/work")
    git.clone(f"file://{place}/origin.git", "other", branch="main", depth=1, cwd=place)
    capsule.files.write(f"{place}/other/file", "from the other\n")
    git.add(all=True, cwd=f"{place}/other")
    git.commit("other", cwd=f"{place}/other")
    git.push(cwd=f"{place}/other")
    git.pull(ff_only=True, cwd=repo)
    assert capsule.files.read(f"{repo}/file") == "from the other\n"
    git.reset(mode="hard", ref="HEAD~1", cwd=repo)
    assert git.status(cwd=repo).behind == 1
    git.commit("diverged", allow_empty=True, cwd=repo)
    with pytest.raises(GitCommandError):
        git.push(cwd=repo)
    git.push(force=True, cwd=repo)
    assert lines(capsule, "git log --format=%s", f"{place}/origin.git") == ["diverged", "first"]
    git.pull(rebase=True, cwd=repo)


def test_remotes(capsule, repo):
    git = capsule.git
    assert git.remote_get(cwd=repo).endswith("/origin.git")
    git.remote_add("backup", f"file://{repo}", fetch=True, cwd=repo)
    assert git.remote_get("backup", cwd=repo) == f"file://{repo}"
    assert git.remote_get("none", cwd=repo) is None


def test_reset_and_restore(capsule, repo):
    git = capsule.git
    capsule.files.write(f"{repo}/file", "changed\n")
    git.add(["file"], cwd=repo)
    git.reset(paths=["file"], cwd=repo)
    assert [(file.index_status, file.work_tree_status) for file in git.status(cwd=repo).files] == [(" ", "M")]
    git.add(["file"], cwd=repo)
    git.restore(["file"], staged=True, cwd=repo)
    assert [(file.index_status, file.work_tree_status) for file in git.status(cwd=repo).files] == [(" ", "M")]
    git.restore(["file"], worktree=True, cwd=repo)
    assert capsule.files.read(f"{repo}/file") == "one\n"


def test_config(capsule, repo):
    git = capsule.git
    git.set_config("some.key", "a value", cwd=repo)
    assert git.get_config("some.key", cwd=repo) == "a value"
    assert git.get_config("some.other", cwd=repo) is None
    git.set_config("some.key", "global", scope="global")
    assert git.get_config("some.key", scope="global") == "global"
    assert git.get_config("user.name", scope="global") == "Tester"


def test_errors(capsule):
    with pytest.raises(GitCommandError) as error:
        capsule.git.clone("file:///no/such/repository")
    assert error.value.exit_code == 128 and "does not appear to be a git repository" in error.value.stderr
    with pytest.raises(GitCommandError):
        capsule.git.status(cwd="/tmp")


def test_authentication(capsule):
    capsule.files.write("/root/locked.py", LOCKED)
    server = capsule.commands.run("exec python3 /root/locked.py", background=True)
    ask = "for i in $(seq 100); do curl -s -o /dev/null http://127.0.0.1:8418 && exit; sleep 0.1; done; exit 1"
    assert capsule.commands.run(ask, timeout=300).exit_code == 0
    for who in ({}, {"username": "me", "password": "wrong"}):
        with pytest.raises(GitAuthError):
            capsule.git.clone("http://127.0.0.1:8418/some/repository.git", **who)
    capsule.git.dangerously_authenticate("me", "secret", host="git.example.com")
    assert "https://me:secret@git.example.com" in capsule.files.read("/root/.git-credentials")
    capsule.commands.kill(server.pid)


def test_async():
    async def run():
        async with await AsyncCapsule.create() as capsule:
            git = capsule.git
            await git.configure_user("Tester", "tester@example.com")
            await git.init("/root/origin.git", bare=True, initial_branch="main")
            await git.clone("file:///root/origin.git", "/root/work")
            await capsule.files.write("/root/work/file", "x")
            await git.add(all=True, cwd="/root/work")
            assert [(file.path, file.index_status) for file in (await git.status(cwd="/root/work")).files] == [("file", "A")]
            await git.commit("first", cwd="/root/work")
            await git.push(branch="main", set_upstream=True, cwd="/root/work")
            await git.create_branch("topic", cwd="/root/work")
            await git.checkout_branch("main", cwd="/root/work")
            await git.delete_branch("topic", cwd="/root/work")
            await git.pull(cwd="/root/work")
            assert [branch.name for branch in await git.branches(cwd="/root/work")] == ["main"]
            assert await git.remote_get(cwd="/root/work") == "file:///root/origin.git"
            await git.set_config("a.b", "c", cwd="/root/work")
            assert await git.get_config("a.b", cwd="/root/work") == "c"
            await capsule.files.write("/root/work/file", "y")
            await git.restore(["file"], worktree=True, cwd="/root/work")
            await git.reset(mode="hard", cwd="/root/work")
            assert await capsule.files.read("/root/work/file") == "x"
            with pytest.raises(GitCommandError):
                await git.clone("file:///no/such/repository")

    asyncio.run(run())

"""Which build this is: the version of the package, and the commit that it was made of."""

import os
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_MAX_SHA = 64


def version() -> str:
    """``source`` where the package is not installed."""
    try:
        return version_of("headrace")
    except PackageNotFoundError:
        return "source"


@cache
def git_sha() -> str:
    """The commit: what the images say by ``HEADRACE_GIT_SHA``, else that of the checkout that this
    file lies in; "" where neither is there.
    """
    given = os.environ.get("HEADRACE_GIT_SHA", "")
    sha = given or _head_of(_ROOT / ".git")
    is_sha = 7 <= len(sha) <= _MAX_SHA and all(digit in "0123456789abcdef" for digit in sha)
    return sha if is_sha else ""


def _head_of(git: Path) -> str:
    """As git stores it (gitrepository-layout): HEAD names a branch, whose commit stands in a file
    of its own or among the packed ones; a worktree has its HEAD elsewhere.
    """
    try:
        if git.is_file():
            git = git.parent / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        branch = head.removeprefix("ref:").strip()
        common = git / "commondir"
        shared = git / common.read_text().strip() if common.is_file() else git
        if (shared / branch).is_file():
            return (shared / branch).read_text().strip()
        packed = (shared / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {branch}")), "")
    except OSError:
        return ""

"""A server that speaks S3 for the tests: moto's, in an environment of its own, on a free port."""

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx

_REQUIREMENTS = Path(__file__).with_suffix(".txt")
_ADDRESS = re.compile(r"Running on (http://\S+)\n")
_START_S = 60.0


def install(folder: Path) -> Path:
    """The server's program, in a new environment with nothing else in it."""
    run = partial(subprocess.run, check=True, capture_output=True)
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run([*pip, "install", "-q", "--no-deps", "--no-compile", "-r", _REQUIREMENTS])
    return folder / "bin" / "moto_server"


@contextmanager
def s3_server(program: Path, folder: Path) -> Generator[str]:
    """Its address while it runs; there is no bucket yet."""
    said = folder / "s3_server.log"
    with said.open("wb") as errors:
        process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", "0"],
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        deadline = time.monotonic() + _START_S
        while not (found := _ADDRESS.search(said.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {said.read_text()[-2000:]}")
            time.sleep(0.02)
        yield found[1]
    finally:
        process.kill()
        process.wait()


def new_bucket(address: str) -> str:
    """The name of a bucket with nothing in it."""
    name = f"bucket-{secrets.token_hex(4)}"
    httpx.put(f"{address}/{name}").raise_for_status()
    return name


def unfinished_uploads(address: str, bucket: str) -> int:
    """Uploads in parts that were begun and neither ended nor aborted."""
    return httpx.get(f"{address}/{bucket}?uploads").text.count("<Upload>")

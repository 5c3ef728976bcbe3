"""Where files lie: a directory or an object store, behind one small interface."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from common.storage.local import LocalStorage
from common.storage.port import Storage

__all__ = ["SCHEMES", "Storage", "check_storage_url", "open_storage"]

SCHEMES = ("file", "s3", "gs", "az")
"""What :func:`open_storage` takes in front of ``://``."""


def check_storage_url(url: str) -> str:
    """The URL, if :func:`open_storage` takes it.

    Raises: ValueError.
    """
    place = urlsplit(url)
    if url and place.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"a storage is one of {known}")
    if place.scheme == "file" and (place.netloc or not place.path.startswith("/")):
        raise ValueError("a directory is file:///with/its/whole/path")
    if url and place.scheme != "file" and not place.netloc:
        raise ValueError(f"name the bucket: {place.scheme}://bucket/prefix")
    if place.query or place.fragment or place.password:
        raise ValueError(
            "a storage's URL is its place only: credentials and endpoint come from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, …)"
        )
    return url


def open_storage(url: str, data_dir: Path) -> Storage:
    """``files`` in the data directory where ``url`` is empty; ``file:///…``, another directory;
    ``s3://bucket/prefix``, ``gs://…`` or ``az://…``, an object store, reached with what its own
    variables in the environment say (``AWS_…``, ``GOOGLE_…``, ``AZURE_…``). Nothing is opened yet.

    Raises: ValueError for another URL; Failure STORAGE_UNAVAILABLE for a store whose variables in
        the environment make no sense.
    """
    check_storage_url(url)
    place = urlsplit(url)
    if not url or place.scheme == "file":
        return LocalStorage(Path(unquote(place.path)) if url else data_dir / "files")
    # 15 MB that most never need.
    from common.storage.objects import ObjectStorage

    return ObjectStorage(url)

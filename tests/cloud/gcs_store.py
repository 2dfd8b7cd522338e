"""The contents of the tests' Google Cloud Storage, in memory."""

import itertools
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

FORBIDDEN = "forbidden"  # a bucket that the token has no rights to


class Object(NamedTuple):
  """A version of an object."""

  data: bytes
  generation: int


class Failed(Exception):
  """A response that reports a failure."""

  def __init__(self, status: HTTPStatus, message: str):
    super().__init__(message)
    self.status = status


class Store:
  """Buckets of objects.

  Attributes:
    buckets: The objects by bucket and name.
    lock: A lock to hold while these change.
  """

  def __init__(self, *buckets: str):
    self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
    self.lock = threading.RLock()
    self._generations = itertools.count(1)

  def files(self, folder: str) -> dict[str, bytes]:
    """Returns the contents of all objects below a folder of the first bucket, by relative path."""
    start = folder.rstrip("/") + "/"
    with self.lock:
      found = dict(next(iter(self.buckets.values())))
    return {
      name.removeprefix(start): object.data
      for name, object in found.items()
      if name.startswith(start) and not name.endswith("/")  # a final slash denotes a folder
    }

  def download(self, folder: str, place: Path) -> Path:
    """Copies a folder of the first bucket to a local folder, and returns that folder."""
    for name, data in self.files(folder).items():
      (place / name).parent.mkdir(parents=True, exist_ok=True)
      (place / name).write_bytes(data)
    return place

  def find(self, bucket: str, name: str) -> Object:
    """Returns an object.

    Raises:
      Failed: The object does not exist.
    """
    if found := self.bucket(bucket).get(name):
      return found
    raise Failed(HTTPStatus.NOT_FOUND, f"No such object: {bucket}/{name}")

  def bucket(self, name: str) -> dict[str, Object]:
    """Returns the objects of a bucket.

    Raises:
      Failed: The bucket does not exist, or the token has no rights to it.
    """
    if name == FORBIDDEN:
      raise Failed(HTTPStatus.FORBIDDEN, f"no access to the Google Cloud Storage bucket {name}")
    if name not in self.buckets:
      raise Failed(HTTPStatus.NOT_FOUND, "The specified bucket does not exist.")
    return self.buckets[name]

  def put(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> dict[str, Any]:
    """Writes an object if the preconditions hold, and returns its resource."""
    with self.lock:
      self.check(query, self.bucket(bucket).get(name))
      self.bucket(bucket)[name] = Object(data, next(self._generations))
      return self.resource(bucket, name)

  def check(self, query: dict[str, str], found: Object | None) -> None:
    """Checks the preconditions of a request.

    Raises:
      Failed: A precondition does not hold.
    """
    generation = found.generation if found else 0
    if int(query.get("ifGenerationMatch", generation)) != generation:
      raise Failed(HTTPStatus.PRECONDITION_FAILED, "ifGenerationMatch does not hold")
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
      raise Failed(HTTPStatus.NOT_MODIFIED, "")

  def resource(self, bucket: str, name: str) -> dict[str, Any]:
    """Returns the API's description of an object."""
    found = self.find(bucket, name)
    return {
      "kind": "storage#object",
      "bucket": bucket,
      "name": name,
      "generation": str(found.generation),
      "metageneration": "1",
      "size": str(len(found.data)),
      "updated": "2026-01-01T00:00:00.000Z",
    }

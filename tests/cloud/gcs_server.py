"""A local, in-memory Google Cloud Storage for unmodified client libraries.

Nothing in the libraries is replaced: TensorFlow's file system (which etils uses for gs://),
TensorStore and google-cloud-storage send the requests that they would send to Google. TensorFlow's
endpoint is compiled in, but its curl respects https_proxy, as does TensorStore's. So this server
acts as that proxy. It terminates TLS for Google's hosts, with a certificate whose authority lives
as long as the server, and responds in their place. It refuses every other host.
google-cloud-storage respects STORAGE_EMULATOR_HOST.

The server implements the part of the JSON API that these three use
(https://cloud.google.com/storage/docs/json_api/v1): preconditions, byte ranges, resumable uploads,
rewriting, and listings in pages. PyPI's gcp-storage-emulator does not suffice. It fails on empty
uploads, with which TensorFlow creates folders. It ignores ifGenerationMatch, on which TensorStore
and our lease rely, and startOffset, without which TensorStore's listing aborts the process. It
never splits a listing into pages.
"""

import contextlib
import http.server
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import trustme

from tests.cloud.gcs_store import Failed, Store

HOSTS = ("www.googleapis.com", "storage.googleapis.com")
TOKEN = "a token"
# Google returns at most 1,000 names at a time; pages are shorter here, so that listings have some.
PAGE = 10


class GcsServer(http.server.ThreadingHTTPServer):
  """The service; use as a context manager.

  Attributes:
    store: The contents of the service.
    requests: Every request so far, such as "POST /upload/storage/v1/b/...".
    refused: Requested hosts and paths that this server does not know.
  """

  daemon_threads = True

  def __init__(self, *buckets: str):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.store = Store(*buckets)
    self.requests: list[str] = []
    self.refused: list[str] = []
    self.uploads: dict[str, tuple[str, str, dict[str, str]]] = {}
    self._authority = trustme.CA()
    self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    self._authority.issue_cert(*HOSTS).configure_cert(self.tls)

  def __enter__(self) -> "GcsServer":
    threading.Thread(target=self.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *exception: Any) -> None:
    self.shutdown()
    self.server_close()

  def environment(self, folder: Path) -> dict[str, str]:
    """Returns environment variables that direct all of a process's requests to this server.

    Args:
      folder: The folder for the authority's certificate.
    """
    authority = folder / "authority.pem"
    self._authority.cert_pem.write_to_path(str(authority))
    here = f"http://127.0.0.1:{self.server_port}"
    return {
      "https_proxy": here,
      "no_proxy": "127.0.0.1,localhost",
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": TOKEN,
      "CURL_CA_BUNDLE": str(authority),  # TensorFlow's
      "TENSORSTORE_CA_BUNDLE": str(authority),
      "STORAGE_EMULATOR_HOST": here,  # google-cloud-storage's, which then requires no login
    }


class _Handler(http.server.BaseHTTPRequestHandler):
  """Handler of the requests in a connection and, after CONNECT, within its TLS."""

  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True  # with it, the two writes of headers and body take 40 ms
  server: GcsServer

  def log_message(self, *_: Any) -> None:
    """Logs nothing."""

  def do_CONNECT(self) -> None:
    host = self.path.partition(":")[0]
    if host not in HOSTS:
      self.server.refused.append(self.path)
      self._answer(HTTPStatus.FORBIDDEN, b"")
      return
    self.send_response(HTTPStatus.OK)
    self.end_headers()
    self.wfile.flush()
    try:
      self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
    except OSError:  # the client has disconnected, or does not trust this server
      self.close_connection = True
      return
    self.rfile = self.connection.makefile("rb")
    self.wfile = self.connection.makefile("wb", buffering=0)
    self.close_connection = False

  def handle(self) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):  # a process that was killed
      super().handle()

  def finish(self) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):
      super().finish()
    self.connection.close()

  def do_GET(self) -> None:
    self._route()

  def do_POST(self) -> None:
    self._route()

  def do_PUT(self) -> None:
    self._route()

  def do_DELETE(self) -> None:
    self._route()

  def _route(self) -> None:
    url = urlsplit(self.path)
    query = {name: values[0] for name, values in parse_qs(url.query, True).items()}
    body = self._body()
    self.server.requests.append(f"{self.command} {self.path}")
    for method, pattern, action in _ROUTES:
      match = re.fullmatch(pattern, url.path)
      if method == self.command and match:
        try:
          action(self, query, body, *map(unquote, match.groups()))
        except Failed as failure:
          message = {"error": {"code": failure.status, "message": str(failure)}}
          self._answer(failure.status, json.dumps(message).encode())
        return
    self.server.refused.append(f"{self.command} {self.path}")
    self._answer(HTTPStatus.NOT_IMPLEMENTED, b"")

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
      return b"".join(self._chunks())
    return self.rfile.read(int(self.headers.get("Content-Length") or 0))

  def _chunks(self) -> Iterator[bytes]:
    while size := int(self.rfile.readline().split(b";")[0], 16):
      yield self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()

  def _answer(self, status: int, data: bytes, **headers: str) -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if self.command != "HEAD" and status != HTTPStatus.NOT_MODIFIED:
      self.wfile.write(data)

  def _json(self, value: Any) -> None:
    self._answer(HTTPStatus.OK, json.dumps(value).encode(), Content_Type="application/json")

  def get_bucket(self, query: dict[str, str], body: bytes, bucket: str) -> None:
    """Confirms that a bucket exists."""
    self.server.store.bucket(bucket)
    self._json({"kind": "storage#bucket", "name": bucket, "location": "US"})

  def get_layout(self, query: dict[str, str], body: bytes, bucket: str) -> None:
    """Reports that a bucket's folders are only prefixes of names."""
    self.server.store.bucket(bucket)
    flat = {"hierarchicalNamespace": {"enabled": False}, "locationType": "multi-region"}
    self._json({"kind": "storage#storageLayout", "bucket": bucket, "location": "US"} | flat)

  def list_objects(self, query: dict[str, str], body: bytes, bucket: str) -> None:
    """Lists names, and their common prefixes up to the delimiter, one page at a time."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    first, end = query.get("startOffset", ""), query.get("endOffset", chr(0x10FFFF))
    with self.server.store.lock:
      found = sorted(self.server.store.bucket(bucket))
    names = [name for name in found if name.startswith(prefix) and first <= name < end]
    entries: dict[str, bool] = {}  # name or common prefix -> whether it is an object
    for name in names:
      head, cut, _ = name[len(prefix) :].partition(delimiter or "\0")
      entries[prefix + head + cut] = not cut
    rest = [entry for entry in entries if entry > query.get("pageToken", "")]
    page = rest[: min(PAGE, int(query.get("maxResults", PAGE)))]
    with self.server.store.lock:
      answer = {
        "kind": "storage#objects",
        "items": [self.server.store.resource(bucket, e) for e in page if entries[e]],
        "prefixes": [entry for entry in page if not entries[entry]],
      }
    if len(page) < len(rest):
      answer["nextPageToken"] = page[-1]
    self._json({name: value for name, value in answer.items() if value})

  def get_object(self, query: dict[str, str], body: bytes, bucket: str, name: str) -> None:
    """Returns the description of an object, or with alt=media its contents."""
    if query.get("alt") == "media":
      self.read_object(query, body, bucket, name)
      return
    found = self.server.store.find(bucket, name)
    self.server.store.check(query, found)
    self._json(self.server.store.resource(bucket, name))

  def read_object(self, query: dict[str, str], body: bytes, bucket: str, name: str) -> None:
    """Returns the contents of an object, or a range of them."""
    found = self.server.store.find(bucket, name)
    self.server.store.check(query, found)
    headers = {"x_goog_generation": str(found.generation)}
    total = len(found.data)
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if not wanted:
      self._answer(HTTPStatus.OK, found.data, **headers)
      return
    first, last = int(wanted[1]), min(int(wanted[2] or total - 1), total - 1)
    if first >= total:
      headers["Content_Range"] = f"bytes */{total}"
      self._answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", **headers)
      return
    headers["Content_Range"] = f"bytes {first}-{last}/{total}"
    self._answer(HTTPStatus.PARTIAL_CONTENT, found.data[first : last + 1], **headers)

  def upload(self, query: dict[str, str], body: bytes, bucket: str) -> None:
    """Writes an object at once, or returns the address for its bytes."""
    if query["uploadType"] == "media":
      self._json(self.server.store.put(bucket, query["name"], body, query))
      return
    if query["uploadType"] == "multipart":  # the resource as JSON, and the bytes
      boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
      _, *parts, _ = (b"\r\n" + body).split(b"\r\n--" + boundary)
      resource, data = (part.partition(b"\r\n\r\n")[2] for part in parts)
      self._json(self.server.store.put(bucket, json.loads(resource)["name"], data, query))
      return
    self.server.store.bucket(bucket)
    number = str(len(self.server.uploads))
    self.server.uploads[number] = bucket, query["name"], query
    place = f"https://{HOSTS[0]}/upload/storage/v1/b/{bucket}/o?upload_id={number}"
    self._answer(HTTPStatus.OK, b"", Location=place)

  def resume_upload(self, query: dict[str, str], body: bytes, _: str) -> None:
    """Receives all bytes of an upload at once, as these libraries send them."""
    bucket, name, asked = self.server.uploads[query["upload_id"]]
    content_range = self.headers.get("Content-Range")
    if content_range and content_range != f"bytes 0-{len(body) - 1}/{len(body)}":
      raise Failed(HTTPStatus.NOT_IMPLEMENTED, f"Content-Range: {content_range}")
    self._json(self.server.store.put(bucket, name, body, asked))

  def rewrite(self, query: dict[str, str], body: bytes, *place: str) -> None:
    """Copies an object."""
    bucket, name, to_bucket, to_name = place
    store = self.server.store
    resource = store.put(to_bucket, to_name, store.find(bucket, name).data, query)
    size = resource["size"]
    self._json(
      {
        "kind": "storage#rewriteResponse",
        "done": True,
        "objectSize": size,
        "totalBytesRewritten": size,
        "resource": resource,
      }
    )

  def delete_object(self, query: dict[str, str], body: bytes, bucket: str, name: str) -> None:
    """Deletes an object."""
    with self.server.store.lock:
      self.server.store.check(query, self.server.store.find(bucket, name))
      del self.server.store.buckets[bucket][name]
    self.send_response(HTTPStatus.NO_CONTENT)
    self.end_headers()


_BUCKET = r"/storage/v1/b/([^/]+)"
_OBJECT = _BUCKET + r"/o/([^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
  ("GET", _BUCKET, _Handler.get_bucket),
  ("GET", _BUCKET + "/storageLayout", _Handler.get_layout),
  ("GET", _BUCKET + "/o", _Handler.list_objects),
  ("GET", _OBJECT, _Handler.get_object),
  ("DELETE", _OBJECT, _Handler.delete_object),
  ("POST", _OBJECT + r"/rewriteTo/b/([^/]+)/o/([^/]+)", _Handler.rewrite),
  ("POST", "/upload" + _BUCKET + "/o", _Handler.upload),
  ("PUT", "/upload" + _BUCKET + "/o", _Handler.resume_upload),
  ("GET", r"/(?!storage/)([^/]+)/(.+)", _Handler.read_object),
]

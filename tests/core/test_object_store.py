"""Messages of Google Cloud Storage errors."""

import json

import pytest

from ll3m.core import object_store
from ll3m.core.flags import Flags

BODY = json.dumps({"error": {"code": 403, "message": "you may not"}}, indent=1)
HTTP = "Error executing an HTTP request: HTTP response code"


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    (f"{HTTP} 403 with body '{BODY}'\n\t when reading metadata of gs://b/x",
     "failed when reading metadata of gs://b/x: you may not (HTTP 403)"),
    (f"{HTTP} 403 with body '{BODY}'", "failed: you may not (HTTP 403)"),
    (f"{HTTP} 404 with body 'Not\n Found'", "failed: Not Found (HTTP 404)"),
    (f"{HTTP} 401 with body ''", "failed: no reason was given (HTTP 401)"),
  ],
)  # fmt: skip
def test_failed_response_becomes_a_sentence(text, sentence):
  assert Flags({}, []).sentence(RuntimeError(text)) == f"Google Cloud Storage {sentence}"


def test_other_errors_keep_their_message():
  assert object_store.explain("HTTP response code 403") is None
  assert Flags({}, []).sentence(ValueError("no  such\nthing")) == "no such thing"


@pytest.mark.parametrize("path", ["gs://b/x", "s3://b/x"])
def test_paths_with_a_scheme_are_remote(path, tmp_path):
  assert object_store.is_remote(path)
  assert not object_store.is_remote(tmp_path)
  object_store.require_bucket(tmp_path)  # a local path has no bucket

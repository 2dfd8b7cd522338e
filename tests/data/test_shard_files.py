"""The files of a glob."""

from ll3m.data import shard_files


def test_a_glob_may_span_folders(tmp_path):
  for name in ("a/x.jsonl", "b/y.jsonl", "b/z.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  found = shard_files.list_files(f"{tmp_path}/*/*.jsonl", "json_dataset.path")
  assert found == [f"{tmp_path}/a/x.jsonl", f"{tmp_path}/b/y.jsonl"]

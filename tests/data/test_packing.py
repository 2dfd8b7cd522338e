"""Packed rows; the oracle is a packer that works token by token."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ll3m.data.packing import Document, Packer, fit, make_row
from ll3m.data.skipped_examples import Unusable

# Documents as (length, loss of each token); ids are made unique so that any mix-up shows.
DOCUMENTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=23), max_size=12)


def make_documents(losses: list[list[int]]) -> list[Document]:
  first = np.cumsum([1, *map(len, losses)])
  return [
    Document(np.arange(start, start + len(loss), dtype=np.int32), np.array(loss, np.int32))
    for start, loss in zip(first, losses, strict=False)
  ]


def brute_force(documents: list[Document], length: int, pack: bool) -> list[list[tuple]]:
  """Returns rows as lists of (token, loss, segment, position), built token by token."""
  rows, row, segment = [], [], 0
  for document in documents:
    if row and not pack:
      rows, row = [*rows, row], []
      segment = 0
    segment, position = segment + 1, 0
    for token, loss in zip(*document, strict=True):
      if len(row) == length:
        rows, row, segment, position = [*rows, row], [], 1, 0
      row.append((int(token), int(loss), segment, position))
      position += 1
    if len(row) == length:
      rows, row, segment = [*rows, row], [], 0
  return [*rows, row] if row else rows


def all_rows(packer: Packer, documents: list[Document]) -> list:
  rows = []
  for document in documents:
    packer.add(document)
    while (row := packer.row()) is not None:
      rows.append(row)
  while (row := packer.row(last=True)) is not None:
    rows.append(row)
  return rows


@settings(deadline=None, max_examples=150)
@given(losses=DOCUMENTS, length=st.integers(2, 17), pack=st.booleans())
def test_rows_equal_those_of_a_token_by_token_packer(losses, length, pack):
  documents = make_documents(losses)
  rows = all_rows(Packer(length, pack=pack), documents)
  expected = brute_force(documents, length, pack)
  assert len(rows) == len(expected)
  for row, tokens in zip(rows, expected, strict=True):
    padded = tokens + [(0, 0, 0, 0)] * (length - len(tokens))
    assert row.inputs.tolist() == [t[0] for t in padded]
    assert row.segment_ids.tolist() == [t[2] for t in padded]
    assert row.positions.tolist() == [t[3] for t in padded]
    after = [*padded[1:], (0, 0, 0, 0)]
    same = [a[2] == b[2] != 0 for a, b in zip(padded, after, strict=True)]
    assert row.targets.tolist() == [b[0] if s else 0 for b, s in zip(after, same, strict=True)]
    assert row.mask.tolist() == [float(s and b[1]) for b, s in zip(after, same, strict=True)]
  kept = [t for row in rows for t in row.inputs[row.segment_ids > 0].tolist()]
  assert kept == [t for document in documents for t in document.tokens.tolist()]


@settings(deadline=None, max_examples=60)
@given(losses=DOCUMENTS, length=st.integers(2, 9), pack=st.booleans(), stop=st.integers(0, 12))
def test_a_restored_packer_continues_at_the_same_token(losses, length, pack, stop):
  documents = make_documents(losses)
  packer, restored = Packer(length, pack=pack), Packer(length, pack=pack)
  before = []
  for document in documents[:stop]:
    packer.add(document)
    if (row := packer.row()) is not None:
      before.append(row)
  restored.set_state(packer.state())
  rest = all_rows(restored, documents[stop:])
  np.testing.assert_equal(rest, all_rows(packer, documents[stop:]))
  tokens = [t for row in [*before, *rest] for t in row.inputs[row.segment_ids > 0].tolist()]
  assert tokens == [t for document in documents for t in document.tokens.tolist()]


def test_a_row_has_the_dtypes_of_the_batch():
  row = make_row([], 3)
  assert [a.dtype.name for a in row] == ["int32", "int32", "float32", "int32", "int32"]


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), max_size=30),
  st.integers(9, 12),
)
def test_whole_documents_are_never_divided_and_never_starve(losses, length):
  documents = make_documents(losses)
  rows = all_rows(Packer(length, pack=True, whole=True), documents)
  numbers, waiting = [], list(range(len(documents)))
  for row in rows:
    taken = []
    for segment in range(1, row.segment_ids.max() + 1):
      here = row.segment_ids == segment
      matches = [
        n for n in waiting
        if n not in taken and row.inputs[here].tolist() == documents[n].tokens.tolist()
      ]  # fmt: skip
      taken.append(matches[0])
      assert row.positions[here].tolist() == list(range(len(documents[matches[0]].tokens)))
    assert taken[0] == waiting[0]  # the one that has waited longest
    waiting = [n for n in waiting if n not in taken]
    numbers += taken
  assert sorted(numbers) == list(range(len(documents)))
  used = [int((row.segment_ids > 0).sum()) for row in rows]
  assert all(a + b > length for a, b in itertools.pairwise(used))  # no two rows fit into one


@pytest.mark.parametrize(
  ("overflow", "kept", "loss"),
  [
    ("split", [1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1]),
    ("truncate", [1, 2, 3, 4], [0, 0, 1, 1]),
    ("keep_end", [1, 4, 5, 6], [0, 1, 0, 1]),
  ],
)
def test_long_documents_are_cut(overflow, kept, loss):
  document = Document(np.arange(1, 7, dtype=np.int32), np.array([0, 0, 1, 1, 0, 1], np.int32))
  found = fit(document, 4, overflow, prefix=[1])
  assert found.tokens.tolist() == kept and found.loss.tolist() == loss
  assert fit(document, 6, overflow, prefix=[1]) == document
  if overflow == "keep_end":  # a conversation need not begin with BOS
    assert fit(document, 4, overflow, prefix=[9]).tokens.tolist() == [3, 4, 5, 6]


def test_documents_without_an_answer_left_are_unusable():
  prompt = Document(np.arange(6, dtype=np.int32), np.array([0, 0, 0, 0, 0, 1], np.int32))
  with pytest.raises(Unusable, match="longer than 4 tokens"):
    fit(prompt, 4, "drop")
  with pytest.raises(Unusable, match="no token to train on within 4 tokens"):
    fit(prompt, 4, "truncate")

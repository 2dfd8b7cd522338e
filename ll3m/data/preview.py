"""Batches as text, to inspect before training: `ll3m.data.show`."""

import sys
from io import TextIOBase

import numpy as np

from ll3m.data.batch import Batch
from ll3m.data.packing import Document
from ll3m.data.text_stream import TextStream
from ll3m.data.tokenizer import Tokenizer

_TRAINED, _READ, _PLAIN = "\033[1;32m", "\033[2m", "\033[0m"
# Visible replacements of control characters.
_VISIBLE = str.maketrans({"\n": "↵\n", "\t": "⇥", "\r": "␍", "\0": "␀"})


def show(
  batch: Batch,
  tokenizer: Tokenizer,
  *,
  rows: int | None = None,
  color: bool | None = None,
  file: TextIOBase | None = None,
) -> None:
  """Prints the rows of a batch: their documents, their tokens, and which tokens are trained.

  Tokens are separated by `|`. Trained tokens are green on a terminal and in brackets elsewhere. A
  `↵` marks each line break.

  Args:
    batch: Arrays of shape [B, T], or [A, B, T] with micro-batches.
    tokenizer: The tokenizer that made the batch.
    rows: Number of rows to print; all by default.
    color: Whether to use colors; by default, only if `file` is a terminal.
    file: Output file; standard output by default.
  """
  file = sys.stdout if file is None else file
  color = file.isatty() if color is None else color
  arrays = Batch(*(np.reshape(array, (-1, np.shape(array)[-1])) for array in batch))
  for number, row in enumerate(zip(*arrays, strict=True)):
    if number == rows:
      break
    print(describe_row(number, Batch(*row), tokenizer, color=color), end="", file=file)


def describe_row(number: int, row: Batch, tokenizer: Tokenizer, *, color: bool) -> str:
  """Returns the text that `show` prints for a row.

  Args:
    number: Index of the row.
    row: Arrays of shape [T].
    tokenizer: The tokenizer that made the row.
    color: Whether to use colors.
  """
  trained = trained_tokens(row)
  used = row.segment_ids != 0
  documents = [segment for segment in np.unique(row.segment_ids) if segment]
  lines = [
    f"row {number}: {len(documents)} documents, {used.sum()} of {used.size} tokens used, "
    f"{trained.sum()} trained"
  ]
  for segment in documents:
    here = row.segment_ids == segment
    lines.append(f"-- document {segment}: {here.sum()} tokens, {trained[here].sum()} trained")
    lines.append(_mark(_pieces(row.inputs[here].tolist(), tokenizer), trained[here], color=color))
  return "\n".join(lines) + "\n\n"


def describe_document(title: str, document: Document, tokenizer: Tokenizer, *, color: bool) -> str:
  """Returns a document as text: its tokens, and which of them are trained.

  Args:
    title: Text before the number of tokens.
    document: The document.
    tokenizer: The tokenizer that made it.
    color: Whether to use colors.
  """
  trained = np.concatenate([[False], document.loss[1:] != 0])  # the first is never predicted
  pieces = _pieces(document.tokens.tolist(), tokenizer)
  head = f"-- {title}: {len(trained):,} tokens, {trained.sum():,} trained"
  return f"{head}\n{_mark(pieces, trained, color=color)}\n"


def trained_tokens(row: Batch) -> np.ndarray:
  """Returns whether predicting each token of a row [T] is trained, bool [T].

  `mask[t]` belongs to the prediction of token t + 1.
  """
  return np.concatenate([[False], np.asarray(row.mask[:-1]) != 0])


def _pieces(ids: list[int], tokenizer: Tokenizer) -> list[str]:
  """Returns the text of each token; the last token of a character has the whole character."""
  # Without `byte_ids`, byte tokens are shown at their own places even if a later one makes the
  # character invalid.
  stream = TextStream(lambda ids: tokenizer.decode(ids, keep_control=True), [])
  pieces = [stream.push(i) for i in ids]
  if pieces:
    pieces[-1] += stream.finish()
  return pieces


def _mark(pieces: list[str], trained: np.ndarray, *, color: bool) -> str:
  marked = []
  for piece, is_trained in zip(pieces, trained, strict=True):
    text = piece.translate(_VISIBLE)
    if color:
      marked.append(f"{_TRAINED if is_trained else _READ}{text}{_PLAIN}")
    else:
      marked.append(f"[{text}]" if is_trained else text)
  return "|".join(marked)

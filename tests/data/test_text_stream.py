"""Incremental decoding; the oracle decodes all tokens at once with the tokenizers library."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from ll3m.data.text_stream import TextStream

BYTES = 256  # ids 0..255


def decode_bytes(tokens):
  """Decodes like a byte-level tokenizer; 256 is a control token, which has no text."""
  return bytes(t for t in tokens if t < 256).decode(errors="replace")


def make_byte_fallback() -> tokenizers.Tokenizer:
  """Builds a tokenizer like Llama 2's: 256 byte pieces, words, and a control token."""
  pieces = [f"<0x{i:02X}>" for i in range(BYTES)] + ["▁a", "▁", "b", "é", "\ufffd", "</s>"]
  encoder = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, []))
  encoder.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  encoder.add_special_tokens(["</s>"])
  return encoder


BYTE_FALLBACK = make_byte_fallback()
SILENT = {BYTES + 5}
# Mostly the bytes of whole characters, so that runs are often valid; also any bytes.
characters = st.sampled_from(["Ꮳ", "Ꮃ", "é", "😀", "x"]).map(lambda c: list(c.encode()))
runs = st.one_of(
  characters,
  st.lists(st.integers(0, BYTES - 1), min_size=1, max_size=5),
  st.lists(st.integers(BYTES, BYTES + 5), min_size=1, max_size=3),
)
token_lists = st.lists(runs, max_size=14).map(lambda parts: [t for part in parts for t in part])


def check_every_prefix(decode, prompt, answer, **kinds):
  stream, text = TextStream(decode, prompt, **kinds), ""
  given_text = decode(prompt)
  for i, token in enumerate(answer, start=1):
    text += stream.push(token)
    whole = decode([*prompt, *answer[:i]])[len(given_text) :]
    assert text + stream.finish() == whole
    assert "\ufffd" not in text or "\ufffd" in decode([*prompt, *answer])


@given(prompt=token_lists, answer=token_lists)
def test_a_byte_fallback_stream_equals_the_decoding_of_all_tokens(prompt, answer):
  check_every_prefix(BYTE_FALLBACK.decode, prompt, answer, byte_ids=range(BYTES), silent_ids=SILENT)


@given(prompt=st.lists(st.integers(0, 255)), answer=st.lists(st.integers(0, 255)))
def test_a_byte_level_stream_equals_the_decoding_of_all_tokens(prompt, answer):
  check_every_prefix(decode_bytes, prompt, answer)


def test_a_run_of_bytes_may_be_longer_than_the_context():
  text = "ᏣᎳᎩᎦᏬᏂᎯᏍᏗ"  # three tokens per character
  answer = [*text.encode(), BYTES + 1, BYTES + 2]
  stream = TextStream(BYTE_FALLBACK.decode, [BYTES], byte_ids=range(BYTES), silent_ids=SILENT)
  pieces = [stream.push(token) for token in answer]
  assert "".join(pieces) + stream.finish() == text + " b"
  # Text that an invalid byte could still change is held back.
  assert pieces == [""] * 27 + [text + " ", "b"]


@pytest.mark.parametrize("prompt", ["", "x", "a longer prompt, é"])
@pytest.mark.parametrize("text", ["plain", "naïve", "日本語", "👩‍🚀 ok", "tail é"])
def test_pieces_join_to_the_text_and_contain_whole_characters(prompt, text):
  stream = TextStream(decode_bytes, list(prompt.encode()))
  pieces = [stream.push(token) for token in text.encode()]
  assert not any("\ufffd" in piece for piece in pieces)
  assert "".join(pieces) + stream.finish() == text


def test_an_incomplete_character_is_returned_at_the_end():
  stream = TextStream(decode_bytes, [])
  assert [stream.push(token) for token in "aé".encode()[:-1]] == ["a", ""]
  assert stream.finish() == "\ufffd"


def test_control_tokens_have_no_text():
  stream = TextStream(decode_bytes, [256, 65], silent_ids={256})
  assert [stream.push(token) for token in (66, 256, 67)] == ["B", "", "C"]
  assert stream.finish() == ""


def test_spaces_between_words_survive_a_decoder_that_strips_the_first():
  words = ["▁The", "▁cat", "s", "▁sat"]
  decode = lambda tokens: "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" ")  # noqa: E731
  stream = TextStream(decode, [0])
  assert [stream.push(token) for token in (1, 2, 3)] == [" cat", "s", " sat"]

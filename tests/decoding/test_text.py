import pytest

from ll3m.decoding.text import TextStream


def decode_bytes(tokens):
  """A byte-level tokenizer; 256 is a control token, which has no text."""
  return bytes(t for t in tokens if t < 256).decode(errors="replace")


@pytest.mark.parametrize("prompt", ["", "x", "a longer prompt, é"])
@pytest.mark.parametrize("text", ["plain", "naïve", "日本語", "👩‍🚀 ok", "tail é"])
def test_pieces_join_to_the_text_and_hold_whole_characters(prompt, text):
  stream = TextStream(decode_bytes, list(prompt.encode()))
  pieces = [stream.push(token) for token in text.encode()]
  assert not any("\ufffd" in piece for piece in pieces)
  assert "".join(pieces) + stream.finish() == text


def test_an_incomplete_end_comes_out_at_last():
  stream = TextStream(decode_bytes, [])
  assert [stream.push(token) for token in "aé".encode()[:-1]] == ["a", ""]
  assert stream.finish() == "\ufffd"


def test_control_tokens_have_no_text():
  stream = TextStream(decode_bytes, [256, 65])
  assert [stream.push(token) for token in (66, 256, 67)] == ["B", "", "C"]
  assert stream.finish() == ""


def test_spaces_between_words_survive_a_decoder_that_strips_the_first():
  words = ["▁The", "▁cat", "s", "▁sat"]
  decode = lambda tokens: "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" ")  # noqa: E731
  stream = TextStream(decode, [0])
  assert [stream.push(token) for token in (1, 2, 3)] == [" cat", "s", " sat"]

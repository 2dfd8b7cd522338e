"""Conversion of SentencePiece models to `tokenizers` encoders that give the same ids.

transformers converts such models too, but for a text that begins with a space, a run of one
character (`****`) or a text that contains a control token, its ids differ from those of
SentencePiece, on which the model was trained.
"""

from collections.abc import Iterable, Mapping

from sentencepiece import sentencepiece_model_pb2 as spm
from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
)

_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"
# Log probability of pieces that SentencePiece never matches in text: bytes and control tokens.
_UNREACHABLE = -1e5


def parse_model(serialized: bytes, name: str) -> spm.ModelProto:
  """Parses a `tokenizer.model`.

  Raises:
    ValueError: The data is not a SentencePiece model.
    NotImplementedError: The model is of whole words or characters, or puts spaces after words.
  """
  try:
    proto = spm.ModelProto.FromString(serialized)
  except Exception as error:  # protobuf's DecodeError, whose class depends on its backend
    raise ValueError(f"{name} is not a SentencePiece model: {error}") from error
  if not proto.pieces:
    raise ValueError(f"{name} is not a SentencePiece model: it has no pieces")
  trainer = proto.trainer_spec
  if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
    raise NotImplementedError(
      f"{name} must be a BPE or Unigram SentencePiece model with spaces before words"
    )
  return proto


def build_encoder(proto: spm.ModelProto, *, legacy: bool = False) -> Tokenizer:
  """Builds an encoder that tokenises text like a SentencePiece model.

  With a Unigram model, two segmentations of a text may have the same score, such as `** *` and
  `* **`. The libraries may then choose different ones.

  Pieces that text cannot produce (control tokens) and pieces that are never split (user-defined
  ones) become added tokens.

  Args:
    proto: The model.
    legacy: Whether text after an added token also begins with a space, as in transformers for
      tokenizers with `legacy: true`. Otherwise only the beginning of the whole text does.
  """
  normalization = proto.normalizer_spec
  encoder = Tokenizer(_model(proto))
  steps: list[normalizers.Normalizer] = []
  if normalization.precompiled_charsmap:
    steps.append(normalizers.Precompiled(normalization.precompiled_charsmap))
  shrink, prefix = normalization.remove_extra_whitespaces, normalization.add_dummy_prefix
  if shrink:
    steps += [
      normalizers.Replace(Regex(r" +\z"), ""),
      normalizers.Replace(Regex(" {2,}"), " "),
    ]
  if shrink and not prefix:
    steps.append(normalizers.Replace(Regex(r"\A "), ""))
  if prefix and not shrink:
    # Metaspace adds no space before a text that begins with one; SentencePiece does.
    steps.append(normalizers.Replace(Regex(rf"\A(?=[ {_SPACE}])"), " "))
  scheme = "never" if not prefix else "always" if legacy else "first"
  encoder.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
  encoder.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
  undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  if prefix:
    undo.append(decoders.Strip(content=" ", left=1))
  encoder.decoder = decoders.Sequence(undo)
  # Added tokens are matched after the whole text is normalised, so that the normalisation of its
  # beginning is not repeated after each of them.
  kinds = proto.SentencePiece
  encoder.add_tokens(
    [
      AddedToken(piece.piece, special=piece.type != kinds.USER_DEFINED, normalized=True)
      for piece in proto.pieces
      if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
    ]
  )
  return encoder


def special_tokens(proto: spm.ModelProto) -> dict[str, str]:
  """Returns the texts of a model's own special pieces, by their names in transformers."""
  trainer = proto.trainer_spec
  ids = {
    "bos_token": trainer.bos_id,
    "eos_token": trainer.eos_id,
    "unk_token": trainer.unk_id,
    "pad_token": trainer.pad_id,
  }
  return {name: proto.pieces[i].piece for name, i in ids.items() if 0 <= i < len(proto.pieces)}


def _model(proto: spm.ModelProto) -> models.Model:
  kinds = proto.SentencePiece
  unknown = next((i for i, p in enumerate(proto.pieces) if p.type == kinds.UNKNOWN), None)
  byte_fallback = proto.trainer_spec.byte_fallback
  if proto.trainer_spec.model_type == _UNIGRAM:
    reachable = (kinds.NORMAL, kinds.USER_DEFINED)
    pieces = [
      (piece.piece, piece.score if piece.type in reachable else _UNREACHABLE)
      for piece in proto.pieces
    ]
    return models.Unigram(pieces, unk_id=unknown, byte_fallback=byte_fallback)
  vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
  merges = merges_from_scores(normal, normal)
  if (piece := find_overlap(merges, normal)) is not None:
    raise NotImplementedError(
      f"the SentencePiece model has overlapping pieces of equal score, such as {piece!r}; which of "
      "them is merged first depends on their order in a text, which tokenizer.json cannot express"
    )
  return models.BPE(
    vocab=vocab,
    merges=merges,
    unk_token=None if unknown is None else proto.pieces[unknown].piece,
    fuse_unk=True,
    byte_fallback=byte_fallback,
  )


def merges_from_scores(pieces: Mapping[str, float], parts: Iterable[str]) -> list[tuple[str, str]]:
  """Lists the merges that form each piece, in the order in which SentencePiece prefers them.

  SentencePiece merges the pair whose result has the highest score, or the leftmost pair of several
  with that score. The tokenizers library ranks pairs, not results. If two pairs that form the same
  piece overlap, as in a run of one character, the pair with the longer left part is the leftmost,
  because merging began there.

  Args:
    pieces: Pieces that merging may form, with their scores.
    parts: Pieces that may be merged.
  """
  parts = set(parts)
  merges = []
  for piece, score in pieces.items():
    for cut in range(len(piece) - 1, 0, -1):
      if piece[:cut] in parts and piece[cut:] in parts:
        merges.append((-score, piece[:cut], piece[cut:]))
  merges.sort(key=lambda merge: merge[0])  # stable: the longer left part stays first
  return [(left, right) for _, left, right in merges]


def find_overlap(merges: list[tuple[str, str]], scores: Mapping[str, float]) -> str | None:
  """Returns a piece that may overlap another piece of equal score in a text, or None.

  Runs of one character are not reported: the pair that would be merged too early does not occur.
  Neither are pieces that overlap themselves, such as `ahaha`: merging never arrives at two pairs
  that form such a piece and share a part (none did in a million random vocabularies).

  Args:
    merges: Result of `merges_from_scores`.
    scores: Scores of the pieces that the merges form.
  """
  following: dict[tuple[float, str], list[str]] = {}
  for left, right in merges:
    following.setdefault((scores[left + right], left), []).append(left + right)
  for left, right in merges:
    piece = left + right
    for other in following.get((scores[piece], right), ()):
      if other != piece and len(set(piece + other)) > 1:
        return piece
  return None

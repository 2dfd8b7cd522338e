"""Tokenizers; the oracles for ids are transformers and, for its own models, SentencePiece."""

import json
import shutil

import pytest
import sentencepiece
import transformers

from ll3m.data import tokenizer_files
from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer

TEXTS = (
  "The `assert` statement",
  "  two spaces, über  naïve 漢字 \U0001f600\n\n\ttab",
  "",
  "for x in range(10): print(x)",
)
CONTROL = "a</s>b <s> <|im_end|><|im_start|> c<unk>"


def load(path, **kwargs):
  return load_tokenizer(TokenizerConfig(path=str(path), **kwargs))


def document_of(tokenizer, text: str) -> list[int]:
  return [*tokenizer.prefix, *tokenizer.encode(text), tokenizer.eos_id]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(folder, tokenizer, text):
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
  assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
@pytest.mark.parametrize("bos", [None, "<s>"])
def test_a_document_begins_as_in_transformers(train_tokenizer, tmp_path, bos, settings):
  ours = load(train_tokenizer(tmp_path, bos=bos, **settings))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("if x")["input_ids"]
  assert (theirs[0] == ours.token_id("<s>")) == (bos is not None)  # both cases occur
  assert document_of(ours, "if x") == [*theirs, ours.token_id("<|im_end|>")]


@pytest.mark.parametrize("after", ["", " <|im_end|>"])
def test_a_document_begins_with_a_bos_that_is_also_eos(train_tokenizer, tmp_path, after):
  train_tokenizer(tmp_path, bos="<|im_end|>", bos_token="<|im_end|>")
  source = json.loads((tmp_path / "tokenizer.json").read_text())
  if after:  # the post-processor also adds one at the end
    source["post_processor"]["single"].append(source["post_processor"]["single"][0])
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("if x")["input_ids"]
  ours = load(tmp_path)
  assert ours.prefix == [ours.eos_id] == theirs[:1]
  assert document_of(ours, "if x") == theirs + ([] if after else [ours.eos_id])


def test_control_strings_in_text_stay_text(tokenizer, mistral_model):
  piece_wise = load(mistral_model)
  for encoder, controls in ((tokenizer, "<|im_start|> <|im_end|> <s>"), (piece_wise, "<s> </s>")):
    ids = encoder.encode(CONTROL)
    assert not {encoder.token_id(control) for control in controls.split()} & set(ids)
    assert encoder.decode(ids).replace("\N{REPLACEMENT CHARACTER}", "") == CONTROL


def test_control_strings_stay_text_if_they_are_pieces_of_the_model(tmp_path):
  from tokenizers import Tokenizer, models

  pieces = ["<unk>", "</s>", *"abc</s> >"]
  encoder = Tokenizer(models.Unigram([(p, -float(len(p) < 2)) for p in dict.fromkeys(pieces)], 0))
  encoder.add_special_tokens(["</s>"])
  encoder.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
  encoder.encode_special_tokens = True
  assert encoder.token_to_id("</s>") in encoder.encode("a</s>b").ids  # the test can fail
  ours = load(tmp_path)
  assert ours.eos_id not in ours.encode("a</s>b")
  assert ours.decode(ours.encode("a</s>b")).replace(" ", "") == "a</s>b"


@pytest.mark.parametrize("text", TEXTS)
def test_documents_equal_those_of_sentencepiece(mistral_model, text):
  model = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model))
  ours = load(mistral_model)
  assert ours.vocab_size == 32000
  assert document_of(ours, text) == [1, *model.encode(text), 2]
  assert ours.decode(document_of(ours, text)) == model.decode(model.encode(text))


def test_extra_tokens_are_appended_and_found_in_text(folder, mistral_model, tmp_path):
  for name, source in (("bpe", folder), ("pieces", mistral_model)):
    plain, more = load(source), load(source, extra_tokens=("<image>", "<audio>"))
    assert more.vocab_size == plain.vocab_size + 2
    ids = more.encode("see <audio> here")
    assert ids.count(plain.vocab_size + 1) == 1 and plain.vocab_size not in ids
    assert more.fingerprint != plain.fingerprint
    more.save(tmp_path / name)
    again = load(tmp_path / name)
    assert again.encode("see <audio> here") == ids and again.fingerprint == more.fingerprint
    # A resumed run reads its own tokenizer while its flags still name the extra tokens.
    twice = load(tmp_path / name, extra_tokens=("<image>", "<audio>"))
    assert (twice.vocab_size, twice.fingerprint) == (more.vocab_size, more.fingerprint)


def test_the_fingerprint_changes_with_the_chat_template(train_tokenizer, tmp_path):
  found = {
    load(train_tokenizer(tmp_path / str(i), **settings)).fingerprint
    for i, settings in enumerate(
      [{}, {"chat_template": "{{ messages }}"}, {"eos_token": "<s>"}, {"unk_token": "<s>"}]
    )
  }
  assert len(found) == 4
  again = load(train_tokenizer(tmp_path / "again"))
  assert again.fingerprint == load(tmp_path / "0").fingerprint


def test_ids_of_added_tokens_must_be_consecutive(folder, tmp_path):
  source = json.loads((folder / "tokenizer.json").read_text())
  last = max(source["model"]["vocab"].values())
  added = source["added_tokens"][-1] | {"content": "<gap>", "id": last + 5}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
  for number in (last + 5, last + 1):
    source["added_tokens"] = [*source["added_tokens"][:4], added | {"id": number}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    if number == last + 1:
      assert load(tmp_path).token_id("<gap>") == number
    else:
      with pytest.raises(ValueError, match=rf"'<gap>' .*{number}, .* {last + 1}\b"):
        load(tmp_path)


def test_the_file_that_takes_precedence_is_logged_if_files_disagree(
  train_tokenizer, tmp_path, caplog, monkeypatch
):
  monkeypatch.setattr(tokenizer_files, "_WARNED", set())
  train_tokenizer(tmp_path)
  (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<s>"}))
  (tmp_path / "chat_template.jinja").write_text("other")
  (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
  ours = load_tokenizer(TokenizerConfig(), checkpoint_dir=tmp_path, source_dir=tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert ours.special_tokens["eos_token"] == theirs.eos_token == "<s>"
  assert ours.chat_template == theirs.chat_template == "other"
  assert ours.stop_ids == {1, 2, ours.token_id("<s>")}
  shutil.copytree(tmp_path, tmp_path / "copy")  # as a run writes it beside its checkpoints
  load(tmp_path / "copy")
  messages = [record.getMessage() for record in caplog.records]
  assert sum("eos_token is <s>, from special_tokens_map.json" in m for m in messages) == 1
  assert sum("chat_template.jinja" in m for m in messages) == 1
  assert sum("[1, 2] of generation_config.json" in m for m in messages) == 1


def test_saving_removes_existing_files(folder, mistral_model, tmp_path):
  load(folder).save(tmp_path)
  (tmp_path / "chat_template.jinja").write_text("stale")
  load(mistral_model).save(tmp_path)
  assert load(tmp_path).fingerprint == load(mistral_model).fingerprint
  load(tmp_path).save(tmp_path)  # onto itself
  assert load(tmp_path).fingerprint == load(mistral_model).fingerprint
  load(folder).save(tmp_path)
  assert load(tmp_path).chat_template == load(folder).chat_template


def test_transformers_reads_a_saved_folder(folder, mistral_model, tmp_path):
  for name, source in (("bpe", folder), ("pieces", mistral_model)):
    load(source).save(tmp_path / name)
    again = load(tmp_path / name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    assert again.encode(TEXTS[3]) == theirs(TEXTS[3], add_special_tokens=False)["input_ids"]
    assert document_of(again, "x") == document_of(load(source), "x")
    assert theirs.eos_token_id == again.eos_id


def test_a_named_tokenizer_is_found_in_the_checkpoint_or_at_the_path(folder, mistral_model):
  def named(name, path=None, **kwargs):
    return load_tokenizer(TokenizerConfig(type=name, path=path), **kwargs).vocab_size

  own = load(folder).vocab_size
  assert load_tokenizer(TokenizerConfig(), checkpoint_dir=folder).vocab_size == own
  assert named("llama", checkpoint_dir=folder, family="llama") == own
  assert named("mistral", str(mistral_model), checkpoint_dir=folder, family="llama") == 32000
  assert named(str(mistral_model), checkpoint_dir=folder, family="llama") == 32000
  with pytest.raises(ValueError, match="'phi' .*checkpoint .*'llama'.*`tokenizer.path`"):
    named("phi", checkpoint_dir=folder, family="llama")
  with pytest.raises(FileNotFoundError, match="tokenizer 'llama' is needed"):
    named("llama")
  with pytest.raises(FileNotFoundError, match="no tokenizer at 'lama'.* llama"):
    named("lama")


def test_a_vocabulary_larger_than_the_embedding_is_refused(folder):
  size = load(folder).vocab_size
  load_tokenizer(TokenizerConfig(path=str(folder)), embedding_size=size)
  with pytest.raises(ValueError, match=rf"larger than the embedding: {size + 1} ids \(1 of"):
    load_tokenizer(TokenizerConfig(path=str(folder), extra_tokens=("<x>",)), embedding_size=size)


def test_files_that_are_not_a_tokenizer_are_refused(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01nonsense")
  with pytest.raises(ValueError, match="not a SentencePiece model"):
    load(tmp_path / "tokenizer.model")
  (tmp_path / "tokenizer.json").write_text("{}")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
  with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
    load(tmp_path)
  for text, message in (("{", "tokenizer_config.json is not JSON"), ("[]", "must hold an object")):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      load(tmp_path)
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.model"):
    load(tmp_path / "empty")


@pytest.mark.parametrize(
  ("file", "content", "message"),
  [
    ("chat_template.jinja", b"\xff", r"chat_template.jinja is not UTF-8 text"),
    ("tokenizer.json", b"\xff", r"tokenizer.json is not UTF-8 text"),
    ("generation_config.json", b'{"eos_token_id": "x"}', "must be an id or a list of ids, got 'x'"),
    (
      "tokenizer_config.json",
      b'{"eos_token": "<s>", "chat_template": [{"name": 1}]}',
      "chat_template must be text, or a list",
    ),
    ("tokenizer_config.json", b'{"chat_template": "{{ messages }}"}', "must name its eos_token"),
  ],
)
def test_damaged_companions_are_named(train_tokenizer, tmp_path, file, content, message):
  train_tokenizer(tmp_path)
  (tmp_path / file).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    load_tokenizer(TokenizerConfig(), checkpoint_dir=tmp_path, source_dir=tmp_path)


@pytest.mark.parametrize(
  "template",
  [
    "{% for %}",
    "{{ 1 / 0 }}",
    "{{ messages[9].content }}",
    "{{ raise_exception('no') }}",
    "{{ x.y.z }}",
  ],
)
def test_a_tokenizer_works_without_its_broken_template(train_tokenizer, tmp_path, template):
  tokenizer = load(train_tokenizer(tmp_path, chat_template=template))
  assert tokenizer.encode("if x") and tokenizer.stop_ids == {tokenizer.eos_id}

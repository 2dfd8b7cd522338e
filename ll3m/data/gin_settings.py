"""Gin bindings of the reference program, which choose the tokenizer of a run.

--gin_bindings='data.data_utils.get_default_vocabulary.tokenizer_type="llama"'
"""

import dataclasses
import tokenize
from collections.abc import Sequence

import gin

from ll3m.data.config import GinConfig, TokenizerConfig


@gin.configurable(module="data.data_utils", denylist=["config"])
def get_default_vocabulary(
  config: TokenizerConfig,
  tokenizer_type: str | None = None,
  has_extra_token: bool | None = None,
) -> TokenizerConfig:
  """Returns the tokenizer options with the gin parameters of this function applied.

  Args:
    config: Options given as flags.
    tokenizer_type: Value that overrides `tokenizer.type`; None keeps the option.
    has_extra_token: False removes the extra tokens; True raises if there are none.

  Raises:
    ValueError: Extra tokens are required and none are given.
  """
  if tokenizer_type is not None:
    config = dataclasses.replace(config, type=tokenizer_type)
  if has_extra_token and not config.extra_tokens:
    raise ValueError("has_extra_token=True requires `tokenizer.extra_tokens`, got none")
  if has_extra_token is False:
    config = dataclasses.replace(config, extra_tokens=())
  return config


def apply(settings: GinConfig, config: TokenizerConfig) -> TokenizerConfig:
  """Returns the tokenizer options with the gin files and bindings applied.

  Raises:
    ValueError: Gin cannot parse a binding, or a binding names an unknown parameter.
    FileNotFoundError: A gin file does not exist.
  """
  bindings = [one for text in settings.gin_bindings for one in split_bindings(text)]
  gin.clear_config()
  try:
    gin.parse_config_files_and_bindings(list(settings.gin_config), bindings)
    return get_default_vocabulary(config)
  except OSError as error:
    raise FileNotFoundError(f"`gin_config`: {error}") from error
  except (SyntaxError, TypeError, ValueError, tokenize.TokenError) as error:
    # The first line names the problem; gin appends the place in its own parser.
    first = next((line for line in str(error).splitlines() if line.strip()), str(error))
    if first.startswith("malformed node"):
      first = 'a value must be a Python literal, with text in quotes: name="value"'
    raise ValueError(f"gin settings {bindings or settings.gin_config}: {first.strip()}") from error


def split_bindings(text: str) -> Sequence[str]:
  r"""Splits at newlines and commas outside quotes and brackets.

  >>> split_bindings('a.b="x,y", c.d=(1, 2)\ne.f=3')
  ['a.b="x,y"', 'c.d=(1, 2)', 'e.f=3']
  """
  parts, depth, quote, previous = [""], 0, "", ""
  for character in text:
    if quote:
      quote = "" if character == quote and previous != "\\" else quote
    elif character in "'\"":
      quote = character
    elif character in "([{":
      depth += 1
    elif character in ")]}":
      depth -= 1
    if character in ",\n" and not quote and depth == 0:
      parts.append("")
    else:
      parts[-1] += character
    previous = "" if previous == "\\" else character
  return [part.strip() for part in parts if part.strip()]

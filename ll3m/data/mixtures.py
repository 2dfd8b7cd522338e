"""Mixtures as data: the sources that a stream draws from, and their rates.

This module does not import TensorFlow, so that a misspelt name is reported at once;
`seqio_tasks.py` registers every entry with seqio. A rate is the relative number of documents drawn
from a source.

The web recipes follow Branch-Train-MiX (Sukhbaatar et al., 2024, https://arxiv.org/abs/2403.07816);
their sources are the parts of Dolma (Soldaini et al., 2024, https://arxiv.org/abs/2402.00159).
To add a mixture, add a line here. Its sources are tasks, or folders of TFRecord shards written by
`tools/prepare_text.py`, which must also be listed in TEXT_SOURCES. docs/dataset.md has an example.
"""

# Folders of shards `{data_dir}/{source}/{train|validation}-00000-of-00032.tfrecord`, whose features
# are `id` and `text`.
TEXT_SOURCES = ("cc_en", "stack", "c4", "reddit", "peS2o", "books", "wiki")

# Text that is part of every Python installation, so that no files are needed.
PYTHON_SOURCES = ("python_reference", "package_descriptions")

MIXTURES: dict[str, tuple[tuple[str, float], ...]] = {
  "wikipedia_mixture": (
    ("cc_en", 9.09),
    ("wiki", 90.91),
  ),
  "dolma_mixture": (
    ("cc_en", 46.23),
    ("stack", 21.37),
    ("c4", 16.19),
    ("reddit", 6.94),
    ("peS2o", 5.49),
    ("books", 2.10),
    ("wiki", 1.66),
  ),
  "python_mixture": (
    ("python_reference", 90.91),
    ("package_descriptions", 9.09),
  ),
}


def known_names() -> tuple[str, ...]:
  """Returns the names of all mixtures and tasks that come with the library."""
  return (*MIXTURES, *TEXT_SOURCES, *PYTHON_SOURCES)


def sources_of(name: str) -> tuple[str, ...]:
  """Returns the tasks of a mixture, or the task itself."""
  return tuple(source for source, _ in MIXTURES.get(name, ((name, 1.0),)))

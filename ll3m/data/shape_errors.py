"""What is wrong with the columns of a row, and what to do, for error messages."""

from ll3m.core.model_config import did_you_mean
from ll3m.data.shapes import SHAPES, Row, Shape

_NAMED = 20  # columns in a message
# Columns that probably hold an answer.
_ANSWERS = ("completion", "answer", "output", "response")


def describe_misfit(row: Row) -> str:
  """Returns why no shape fits, and what to do, for an error message."""
  columns = list(row)[:_NAMED]
  tried = "; ".join(
    f"{shape.title} lacks {', '.join(shape.lacks(columns))}" for shape in SHAPES.values()
  )
  names = columns or ["question", "answer"]
  answer = next((name for name in names if name in _ANSWERS), names[-1])
  question = next((name for name in names if name != answer), "")
  how = f"`completion`='{{{answer}}}' alone trains on texts without a prompt"
  if question:
    how = f"name them with `prompt_template`='{{{question}}}' and `completion`='{{{answer}}}'"
  return (
    f"its columns are {', '.join(columns) or 'none'}, which no known shape has ({tried}): {how}"
  )


def describe_lack(shape: Shape, row: Row) -> str:
  """Returns the columns of a row, for an error message, if it lacks one of a shape, or ""."""
  columns = list(row)
  lacking = shape.lacks(columns)
  if not lacking:
    return ""
  shown = ", ".join(columns[:_NAMED]) + (", ..." if len(columns) > _NAMED else "")
  return f"; its columns are {shown or 'none'}{did_you_mean(lacking[0], columns)}"

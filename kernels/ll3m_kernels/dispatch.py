"""The one place that chooses an operation's implementation."""

IMPLEMENTATIONS = ("xla",)


def resolve(implementation: str | None) -> str:
  """Returns the implementation to run.

  Args:
    implementation: a name, or None for the best one there is.

  Raises:
    NotImplementedError: there is no implementation of that name.
  """
  if implementation is None:
    return "xla"
  if implementation not in IMPLEMENTATIONS:
    raise NotImplementedError(
      f"implementation={implementation!r} does not exist; expected None or one of "
      f"{', '.join(map(repr, IMPLEMENTATIONS))}"
    )
  return implementation

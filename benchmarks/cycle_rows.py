"""The rows of the table of cycles: their shapes, their peers, and the work that they must do.

Dimensions: T tokens, N query heads, K KV heads, H head dim, D features.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks import shapes
from benchmarks.cycle_builders import norm_traffic
from ll3m_kernels.dispatch import GENERATIONS, MIB

_JAX_BLOCKS = (256, 512, 1024, 2048)
_COPY_BLOCKS = (MIB // 2, MIB, 2 * MIB, 4 * MIB)
# The rows of a norm, or the tokens of a rotary embedding.
_ROWS = 8192


class Peer(NamedTuple):
  """Another implementation that does the same work.

  Attributes:
    name: Name in the table.
    implementation: Name in `cycle_builders`.
    kernels: Slice of its priced kernels that do the work of the pass.
    blocks: Block sizes to try; each kernel gets its best one.
    whole_program: Whether to price the whole program, because it does not consist of kernels.
    changes: Changes to the arguments of the row: other passes, or options that the peer lacks.
    by_head: Whether to price one head per core and multiply by the number of heads. This requires
      heads that share nothing, and avoids a profile of many heads, which takes long.
    times: Number of times that it must run to do all of the work.
  """

  name: str
  implementation: str
  kernels: slice = slice(None)
  blocks: tuple[int, ...] = (0,)
  whole_program: bool = False
  changes: Mapping[str, Any] = {}
  by_head: bool = False
  times: int = 1


class Pass(NamedTuple):
  """One pass of a row.

  Attributes:
    name: Name of the pass.
    kernels: Slice of the priced kernels that do its work.
    flops: FLOPs of the products that it needs.
    hbm_bytes: Bytes of all inputs, read once, and of all outputs, written once.
    peers: Other implementations that do the same work.
  """

  name: str
  kernels: slice
  flops: float
  hbm_bytes: float
  peers: tuple[Peer, ...]


class Row(NamedTuple):
  """One shape.

  Attributes:
    group: Heading of the table that contains the row.
    name: Name of the shape.
    builder: Name of a function in `cycle_builders`.
    arguments: Keyword arguments of the builder.
    passes: Passes that are reported separately.
    is_quick: Whether the row is one of the few that are priced in minutes.
    is_per_core: Whether heads, FLOPs and bytes are given per core.
  """

  group: str
  name: str
  builder: str
  arguments: Mapping[str, Any]
  passes: tuple[Pass, ...]
  is_quick: bool = False
  is_per_core: bool = False

  def on(self, generation: str) -> "Row":
    """Returns the row and its peers, adapted to a generation."""
    if "heads" not in self.arguments:
      return self
    cores = GENERATIONS[generation].num_cores
    factor = cores if self.is_per_core else 1
    heads = factor * self.arguments["heads"]

    def divided(peer):
      if not peer.by_head:
        return peer
      count = 1 if peer.whole_program else cores
      changes = {**peer.changes, "heads": count, "kv_heads": count}
      return peer._replace(changes=changes, times=heads // count)

    passes = tuple(
      part._replace(
        flops=factor * part.flops,
        hbm_bytes=factor * part.hbm_bytes,
        peers=tuple(map(divided, part.peers)),
      )
      for part in self.passes
    )
    arguments = {**self.arguments, "heads": heads, "kv_heads": factor * self.arguments["kv_heads"]}
    return self._replace(arguments=arguments, passes=passes)


def rows() -> Iterator[Row]:
  """Yields all rows of the table."""
  yield from _attention_rows()
  yield from _model_rows()
  for model in ("tiny_llama_1b", "gemma_7b", "llama2_7b", "phi_2"):
    for adds in ("", "add_"):
      yield _norm(model, adds)
  for model in shapes.ROTARY:
    yield _rotary(model)


def _attention_rows() -> Iterator[Row]:
  """Yields attention at different head dims, masks and lengths, with 8 query and 2 KV heads."""
  shape = {"tokens": 4096, "heads": 8, "kv_heads": 2, "head_dim": 128, "is_causal": True}
  forward = {"backward": False}
  # With several heads, the profile aborts on the copies that XLA makes.
  xla = Peer("XLA, head by head", "xla", whole_program=True, changes=forward, by_head=True)
  others = (
    xla,
    Peer("jax splash_attention", "splash", blocks=(1024,), changes=forward, by_head=True),
    Peer("tokamax", "tokamax", changes=forward, by_head=True),
  )
  yield _attention("causal H=128", shape | {"backward": True}, others, is_quick=True)
  yield _attention("full H=128", shape | {"is_causal": False}, (xla,), is_quick=True)
  yield _attention("causal H=256", shape | {"head_dim": 256, "kv_heads": 1}, is_quick=True)
  yield _attention("causal H=64", shape | {"head_dim": 64}, is_quick=True)
  for head_dim in (80, 96, 100):
    yield _attention(f"causal H={head_dim}", shape | {"head_dim": head_dim})
  yield _attention("causal T=4000", shape | {"tokens": 4000}, has_jax=False)
  shape |= {"tokens": 16_384, "heads": 4, "kv_heads": 1}
  for name, window in (("causal T=16384", None), ("window 4096, T=16384", 4096)):
    arguments = shape | {"window": window}
    yield _attention(f"{name}, 4 : 1 heads", arguments, has_jax=False, is_per_core=True)


def _model_rows() -> Iterator[Row]:
  """Yields each model's attention, for the query heads of one KV head.

  Models with one query head per KV head get four KV heads: with a single head, the fetches before
  its first step would be a tenth of the estimate.
  """
  seen = set()
  for model, shape in shapes.ATTENTION.items():
    unit = (shape.group, shape.head_dim, shape.window, shape.soft_cap)
    if unit in seen:
      continue
    seen.add(unit)
    kv_heads = 4 if shape.group == 1 else 1
    arguments = {
      "tokens": 4096 if shape.window is None else 2 * shape.window,
      "heads": kv_heads * shape.group,
      "kv_heads": kv_heads,
      "head_dim": shape.head_dim,
      "is_causal": True,
      "window": shape.window,
      "soft_cap": shape.soft_cap,
      "backward": True,
    }
    heads = f"{arguments['heads']} : {kv_heads} heads"
    name = f"{model}, {heads}, H={shape.head_dim}, T={arguments['tokens']}"
    yield _attention(name, arguments, group="models", is_per_core=True)


def _attention(
  name: str,
  arguments: Mapping[str, Any],
  others: tuple[Peer, ...] = (),
  *,
  group: str = "attention",
  has_jax: bool = True,
  is_quick: bool = False,
  is_per_core: bool = False,
) -> Row:
  """Returns a row of 4 H FLOPs per head and pair (causal: half of all), and 2.5x that backward."""
  tokens, window = arguments["tokens"], arguments.get("window")
  pairs = tokens**2 / (2 if arguments["is_causal"] else 1)
  if window is not None:
    pairs -= max(tokens - window, 0) ** 2 / 2
  flops = 4.0 * pairs * arguments["heads"] * arguments["head_dim"]
  queries = 2.0 * tokens * arguments["heads"] * arguments["head_dim"]  # bytes
  keys = 2.0 * tokens * arguments["kv_heads"] * arguments["head_dim"]
  sums = 4.0 * tokens * arguments["heads"]

  def make_pass(name, kernels, flops, hbm_bytes, others):
    jax = Peer(
      "jax flash_attention",
      "jax",
      kernels,
      _JAX_BLOCKS,
      False,
      {"window": None, "soft_cap": None},
      True,
    )
    return Pass(name, kernels, flops, hbm_bytes, ((jax,) if has_jax else ()) + others)

  hbm_bytes = 2 * queries + 2 * keys + sums
  passes = [make_pass("forward", slice(1), flops, hbm_bytes, others)]
  if arguments.get("backward"):
    hbm_bytes += 3 * queries + 4 * keys + 2 * sums
    passes.append(make_pass("forward + backward", slice(None), 3.5 * flops, hbm_bytes, ()))
  return Row(group, name, "attention", arguments, tuple(passes), is_quick, is_per_core)


def _norm(model: str, adds: str) -> Row:
  features, kind, _ = shapes.NORMS[model]
  operation = f"{adds}{kind}_norm"
  passes = []
  for name, kernels in (("forward", slice(1)), ("backward", slice(1, 2))):
    is_backward = name == "backward"
    hbm_bytes = 2.0 * sum(norm_traffic(operation, is_backward)) * _ROWS * features
    copy = Peer("copy", "copy", blocks=_COPY_BLOCKS, changes={"backward": is_backward})
    passes.append(Pass(name, kernels, 0.0, hbm_bytes, (copy,)))
  arguments = {"operation": operation, "rows": _ROWS, "features": features, "backward": True}
  return Row("norms", f"{operation} D={features}", "norm", arguments, tuple(passes))


def _rotary(model: str) -> Row:
  shape = shapes.ROTARY[model]
  arguments = {
    "tokens": _ROWS,
    "heads": shape.num_heads,
    "kv_heads": shape.num_kv_heads,
    "head_dim": shape.head_dim,
  }
  hbm_bytes = 4.0 * _ROWS * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
  copy = Peer("copy", "copy", blocks=_COPY_BLOCKS)
  name = f"{model}, {shape.num_heads} + {shape.num_kv_heads} heads, H={shape.head_dim}"
  passes = (Pass("forward", slice(None), 0.0, hbm_bytes, (copy,)),)
  return Row("rotary", name, "rotary", arguments, passes)

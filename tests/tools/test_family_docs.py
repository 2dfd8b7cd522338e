"""docs/families.md is what the presets say."""

import json
from pathlib import Path

from ll3m import families
from tools import family_docs

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date():
  """If not: python tools/family_docs.py > docs/families.md"""
  plans = json.loads((DOCS / "families.json").read_text())
  page = (DOCS / "families.md").read_text()
  assert family_docs.page(plans) + "\n" == page
  assert all(f"| `{name}` |" in page for name in families.PRESETS)


def test_the_planned_machines_hold_the_parameters_and_the_optimizer():
  """At least 12 bytes per parameter: it and two moments in float32."""
  plans = json.loads((DOCS / "families.json").read_text())
  assert plans.keys() <= families.PRESETS.keys()
  for name, plan in plans.items():
    held = plan["bytes_per_chip"]["parameters"] + plan["bytes_per_chip"]["optimizer"]
    total = 12 * family_docs.count(name)
    assert total <= held * family_docs.chips(plan["machine"]) < 1.1 * total, name

"""What diffusers' own tests say of slim models beside dense ones: comparison, counts and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

KINDS = ("both", "dense alone", "slim alone", "neither", "skipped")

Outcomes = dict[str, str]
"""Test -> passed, failed or skipped."""

Rows = dict[str, dict[str, str]]
"""Test -> its outcome dense and slim; where it passes dense alone, what it says slim."""


@dataclass(frozen=True)
class Reason:
    """Why tests that pass dense need not pass slim.

    Attributes:
        tests: a pattern of their names.
        says: what their failure must contain, so that another one is not excused.
        why: the reason.
    """

    tests: str
    says: str
    why: str


PADDED = (
    "where values have another width than queries and keys, a processor that is set is exchanged "
    "for one that computes the same on padded projections"
)
PICTURE = "compares with a stored picture of the dense random weights"

REASONS = (
    Reason(
        "*::test_gradient_checkpointing_is_applied",
        "Modules with GC enabled {'Slim",
        "expects the name of the dense class, and finds that of the slim one: checkpointing is on",
    ),
    Reason(
        "*::TestUNet2DConditionAttention::test_special_attn_proc",
        "== 8",
        "counts the calls of attention layers, and layers that were removed make none",
    ),
    Reason(
        "*::TestUNet2DConditionCustomDiffusion::test_custom_diffusion_*",
        "to_k.weight'",
        "copies the keys of every attention layer, and layers that were removed have none",
    ),
    Reason(
        "*ip_adapter*",
        "was made for the dense layers",
        "the adapter's keys and values are as wide as those of the dense layers: refused by name",
    ),
    Reason("*::test_attention_processor_dict", "should be AttnProcessor", PADDED),
    Reason("*::test_get_set_processor", "Retrieved processor should be the same", PADDED),
    Reason(
        "*::test_fuse_unfuse_qkv_projections",
        "projections cannot be fused",
        "fused projections have one width, these values another than queries: refused by name",
    ),
    Reason(
        "*::test_model_with_class_embeddings_concat",
        "shapes cannot be multiplied",
        "changes the width of the time embedding after the widths were found",
    ),
    Reason("*DiTPipelineFastTests::test_inference", "not less than", PICTURE),
)


def worst(earlier: str | None, phase: str) -> str:
    """The outcome of a test, from that of its phases so far and of one more."""
    order = ("passed", "skipped", "failed")
    return phase if earlier is None else max(earlier, phase, key=order.index)


def compare(dense: Outcomes, slim: Outcomes, messages: dict[str, str]) -> Rows:
    """Both outcomes of every test; one that did not run is `absent`."""
    names = sorted({*dense, *slim})
    rows = {
        name: {"dense": dense.get(name, "absent"), "slim": slim.get(name, "absent")}
        for name in names
    }
    for name in slim_only(rows):
        rows[name]["says"] = messages.get(name, "")
    return rows


def slim_only(rows: Rows) -> list[str]:
    """Tests that pass dense and do not pass slim."""
    return [name for name, row in rows.items() if row["dense"] == "passed" != row["slim"]]


def counts(rows: Rows) -> dict[str, int]:
    """How many tests passed both ways, dense alone, slim alone, neither, and were skipped."""
    found = Counter(_kind(row) for row in rows.values())
    return {kind: found[kind] for kind in KINDS}


def _kind(row: dict[str, str]) -> str:
    dense, slim = row["dense"] == "passed", row["slim"] == "passed"
    if dense or slim:
        return "both" if dense and slim else "dense alone" if dense else "slim alone"
    return "neither" if "failed" in row.values() else "skipped"


def reason_of(test: str, row: dict[str, str], reasons: Sequence[Reason] = REASONS) -> str | None:
    """Why a test need not pass on a slim model; None where it is to."""
    for reason in reasons:
        if fnmatchcase(test, reason.tests) and reason.says in row.get("says", ""):
            return reason.why
    return None


def unexplained(families: dict[str, Rows], reasons: Sequence[Reason] = REASONS) -> list[str]:
    """Tests that pass dense alone, for no reason that is known."""
    return [
        name
        for rows in families.values()
        for name in slim_only(rows)
        if reason_of(name, rows[name], reasons) is None
    ]


def table(families: dict[str, Rows]) -> str:
    """Counts by family, in Markdown."""
    lines = [f"| family | {' | '.join(KINDS)} |", f"|---{'|---' * len(KINDS)}|"]
    for family, rows in families.items():
        lines.append(f"| {family} | {' | '.join(map(str, counts(rows).values()))} |")
    return "\n".join(lines)


def failures(families: dict[str, Rows], reasons: Sequence[Reason] = REASONS) -> str:
    """Tests that pass dense alone, with the reason, in Markdown; a sentence where there is none."""
    found: dict[tuple[str, str], list[str]] = {}
    for family, rows in families.items():
        for name in slim_only(rows):
            why = reason_of(name, rows[name], reasons) or "**not explained**"
            found.setdefault((name.rpartition("::")[2], why), []).append(family)
    if not found:
        return "Every test that passes dense passes slim."
    lines = [
        f"| `{test}` | {', '.join(dict.fromkeys(names))} | {why} |"
        for (test, why), names in found.items()
    ]
    return "\n".join(["| test | in | why it need not pass slim |", "|---|---|---|", *lines])


def page(result: dict[str, Any]) -> str:
    """What the documentation says of a run."""
    families = result["families"]
    return (
        f"diffusers {result['diffusers']}, tests of {result['tests']}.\n\n{table(families)}\n\n"
        f"{failures(families)}"
    )

"""The plan: a width for every group, as JSON that a person can read, edit and pass back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from slimdiff.errors import SlimdiffError
from slimdiff.groups import Group

VERSION = 1


@dataclass(frozen=True)
class Entry:
    """What becomes of one group.

    Attributes:
        kind: the group's kind, for the reader.
        width: channels per head, hidden units, or ResNet channels, that stay; 0 where the whole
            layer goes, and puts out its mean.
        dense_width: how many there were.
        heads: attention heads that stay (1 for the others).
        dense_heads: how many there were.
    """

    kind: str
    width: int
    dense_width: int
    heads: int = 1
    dense_heads: int = 1

    @property
    def is_full(self) -> bool:
        """Nothing is removed."""
        return (self.width, self.heads) == (self.dense_width, self.dense_heads)


@dataclass(frozen=True)
class Plan:
    """Widths of all groups, and how they came about.

    Attributes:
        denoiser: class name of the dense denoiser.
        recipe: how groups are decomposed.
        entries: group name -> what becomes of it.
        allocation: how the widths were chosen.
        budget: what was asked for, as text.
        figures: measured and predicted figures, for reports; nothing is computed from them.
        fused: paths of the upsamplers that are fused, which changes no output.
    """

    denoiser: str
    recipe: str
    entries: dict[str, Entry]
    allocation: str = "by hand"
    budget: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    version: int = VERSION

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "plan") -> Plan:
        """Read `to_json`'s text; `name` stands for it in errors.

        Raises:
            SlimdiffError: not a plan, or of another version.
        """
        try:
            data = json.loads(text)
            version = data["version"]
            if version != VERSION:
                raise SlimdiffError(
                    f"{name}: plan version {version}, this slimdiff reads {VERSION}; "
                    f"upgrade slimdiff or make the plan again"
                )
            entries = {name: Entry(**entry) for name, entry in data.pop("entries").items()}
            return cls(entries=entries, **data)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise SlimdiffError(f"{name}: not a slimdiff plan ({error})") from error

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            SlimdiffError: missing or not a plan.
        """
        if not Path(path).is_file():
            raise SlimdiffError(f"{path}: no such plan file")
        return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse a plan that does not fit these groups.

        Raises:
            SlimdiffError: names the group, the value and what was expected.
        """
        names = {group.name for group in groups}
        if strange := sorted(set(self.entries) - names):
            raise SlimdiffError(
                f"the plan names {strange[0]}, which the denoiser does not have; "
                f"was it made for another model?"
            )
        for group in groups:
            if entry := self.entries.get(group.name):
                _check_entry(group, entry)
        self._check_fused(groups)
        self._check_heads(groups)
        self._check_removed(groups)
        self._check_tied(groups)

    def changed(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that lose something."""
        return [g for g in groups if g.name in self.entries and not self.entries[g.name].is_full]

    def narrowed(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that lose something, but not all."""
        return [group for group in self.changed(groups) if self.entries[group.name].width]

    def removed(self, groups: Sequence[Group]) -> list[Group]:
        """The groups of layers that go wholly."""
        return [g for g in groups if g.name in self.entries and not self.entries[g.name].width]

    def _check_fused(self, groups: Sequence[Group]) -> None:
        known = sorted(group.upsampler for group in groups if group.upsampler)
        if strange := sorted(set(self.fused) - set(known)):
            raise SlimdiffError(
                f"the plan fuses {strange[0]}, which is no upsampler of the denoiser; expected "
                f"some of {', '.join(known) or 'none'}"
            )

    def _check_removed(self, groups: Sequence[Group]) -> None:
        gone = {group.name for group in self.removed(groups)}
        layers = {group.layer for group in groups if group.name in gone}
        for group in groups:
            if group.layer in layers and group.name not in gone:
                raise SlimdiffError(
                    f"{group.name}: keeps a width, but its attention layer's other half is removed "
                    f"(width 0); give both 0, or both a width"
                )

    def _check_heads(self, groups: Sequence[Group]) -> None:
        heads: dict[str, int] = {}
        queries = {group.layer for group in groups if group.kind == "query_key"}
        for group in groups:
            kept = self.entries[group.name].heads if group.name in self.entries else group.heads
            if heads.setdefault(group.layer, kept) != kept:
                raise SlimdiffError(
                    f"{group.name}: keeps {kept} heads, but its attention layer's other half "
                    f"keeps {heads[group.layer]}; give both the same"
                )
            if kept != group.heads and group.layer not in queries:
                raise SlimdiffError(
                    f"{group.name}: keeps {kept} of {group.heads} heads, but the queries and keys "
                    f"of its layer stay as they are; keep all heads, narrow them"
                )

    def _check_tied(self, groups: Sequence[Group]) -> None:
        widths: dict[str, int] = {}
        for group in (group for group in groups if group.tied):
            own = self.entries[group.name].width if group.name in self.entries else group.width
            if widths.setdefault(group.layer, own) != own:
                raise SlimdiffError(
                    f"{group.name}: has width {own}, but its attention layer's other half has "
                    f"{widths[group.layer]}; a text encoder takes one width, give both the same"
                )


def _check_entry(group: Group, entry: Entry) -> None:
    dense = (entry.dense_width, entry.dense_heads)
    if dense != (group.width, group.heads):
        raise SlimdiffError(
            f"{group.name}: the plan was made for (width, heads) {dense}, the denoiser has "
            f"{(group.width, group.heads)}; was it made for another model, or slimmed already?"
        )
    if group.fixed_heads and entry.heads != group.heads:
        raise SlimdiffError(
            f"{group.name}: heads is {entry.heads!r}, expected {group.heads}; no head of this "
            f"layer can go, narrow all of them"
        )
    for what, value, largest in (
        ("width", entry.width, group.width),
        ("heads", entry.heads, group.heads),
    ):
        step = group.step if what == "width" else 1
        least = 0 if what == "width" else 1
        if not isinstance(value, int) or not least <= value <= largest or value % step:
            multiple = f"a multiple of {step}" if step > 1 else "an integer"
            raise SlimdiffError(
                f"{group.name}: {what} is {value!r}, expected {multiple} from {least} to {largest}"
            )


@dataclass(frozen=True)
class SlimRecord:
    """What a slim denoiser carries along: its plan and the maps from dense to slim weights.

    `maps` is keyed `<group name>/<map name>`. Where the slim config has `healed`, the weights were
    trained after the maps made them.
    """

    plan: Plan
    maps: dict[str, Tensor]

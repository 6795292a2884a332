"""What is wrong in a file, and where; all of it at once."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Values: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """A mistake."""

    where: str
    """Dotted keys, and indices."""
    what: str
    """What is wrong, and what to do."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


def join(where: str, key: str | int) -> str:
    """Return the place of a key inside a place."""
    return f"{where}.{key}" if where else str(key)


def unknown_keys(values: Values, known: Collection[str], where: str) -> list[Finding]:
    """Return a finding for each key that is not known, with the nearest one that is."""
    findings: list[Finding] = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            findings.append(Finding(join(where, key), f"unknown key; {hint}"))
    return findings


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping, or an empty one for anything else; its type is checked elsewhere."""
    return dict(value) if isinstance(value, Mapping) else {}


def items(value: Any) -> list[Any]:
    """Return a list, or an empty one for anything else."""
    return list(value) if isinstance(value, list) else []

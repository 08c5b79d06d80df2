"""Which part of a nested model a stored tensor belongs to, and its name inside that part.

Requirement: the same decoder is stored as `model.layers...`, `language_model.model.layers...` or
`model.language_model.layers...`; its table knows one spelling. What joins parts (projectors) is of
none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_DECODER = (
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("language_model.", ""),
    ("thinker.model.", "model."),
    ("thinker.lm_head.", "lm_head."),
)
"""Beginning of a stored name → what stands there instead in a decoder alone."""
_TOWERS = {
    "vision": ("vision_tower.vision_model.", "vision_tower.", "vision_model.", "visual."),
    "audio": ("audio_tower.",),
}
_OUTER = ("model.", "thinker.", "")
_ALONE = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")


@dataclass(slots=True)
class PartNames:
    """The tensors of one part: `stored` is name inside the part → name in the files."""

    stored: dict[str, str] = field(default_factory=dict)
    begins: tuple[str, str] = ("", "")

    def spelled(self, name: str) -> str:
        """Return how the files spell a name of the part, or would if they had it."""
        if name in self.stored:
            return self.stored[name]
        outer, inner = self.begins
        return outer + name.removeprefix(inner) if name.startswith(inner) else name


def names_by_part(
    names: Iterable[str], parts: Sequence[str], decoder: str
) -> tuple[Mapping[str, PartNames], tuple[str, ...]]:
    """Return each part's tensors, and those that belong to no part.

    Args:
        names: as the files have them.
        parts: the parts' names, as in the config.
        decoder: the one that is the decoder.
    """
    found = {part: PartNames() for part in parts}
    if list(parts) == [decoder]:
        found[decoder].stored.update((name, name) for name in names)
        return found, ()
    kinds = {kind: part for part in parts for kind in _TOWERS if kind in part and part != decoder}
    begins = [
        (f"{outer}{prefix}", "", part)
        for kind, part in kinds.items()
        for prefix in _TOWERS[kind]
        for outer in _OUTER
    ]
    begins += [(outer, inner, decoder) for outer, inner in _DECODER]
    rest = []
    for name in names:
        match = next((one for one in begins if name.startswith(one[0])), None)
        if match is None and name.startswith(_ALONE):
            match = ("", "", decoder)
        if match is None:
            rest.append(name)
            continue
        outer, inner, part = match
        found[part].stored[inner + name.removeprefix(outer)] = name
        found[part].begins = (outer, inner)
    return found, tuple(rest)

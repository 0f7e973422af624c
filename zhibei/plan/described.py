"""Machines described in a YAML file. Knows fields, units and their errors, not files.

What the file leaves out is assumed as for a named card (`zhibei/plan/machines.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from zhibei.config.errors import UserError
from zhibei.plan.cards import Card, card_of
from zhibei.plan.machines import (
    FREE_SHARE,
    MOST_CARDS,
    MOST_NODES,
    SHARED_SHARE,
    Gpu,
    Machine,
    gpu_of,
    machine_of,
    plain_computer,
)


def machine_from(mapping: Any, *, where: str, lines: Mapping[str, int] | None = None) -> Machine:
    """A machine from the mapping of a YAML file. `lines` gives the line of a dotted field, for errors.

    card: a100-40g            # a name, or {name, memory, capability, vendor, bandwidth, half_tflops}, or a list of both
    gpus: 4                   # cards of one node; nodes: 1
    cores: 64
    host_memory: 512 GiB      # a bare number is GiB; host_free, shared_memory and disk_free alike
    gpu_link: nvlink          # nvlink, pcie or none; node_link: 25 (GB/s)

    Whatever is left out is assumed as for a named card. Raises UserError with file, field, value and remedy.
    """
    reader = _Reader(where, lines or {})
    if not isinstance(mapping, Mapping) or not mapping:
        raise UserError(
            f"{_shown(mapping)} instead of the description of a machine",
            expected=f"a mapping with some of {', '.join(FIELDS)}",
            fix="begin with  card: v100-32g  and  gpus: 4",
            where=where,
        )
    reader.require_known(mapping, FIELDS, "")
    values = {key: reader.read(FIELDS[key], key, value) for key, value in mapping.items() if FIELDS[key] is not None}
    machine, gpus = _plain_machine(mapping, values, reader)
    changes = {OWN_NAMES[key]: value for key, value in values.items() if key in OWN_NAMES}
    if "host_memory" in values:
        changes.setdefault("host_free_gib", FREE_SHARE * values["host_memory"])
        changes.setdefault("shared_memory_gib", SHARED_SHARE * values["host_memory"])
    if len(gpus) < 2 and "gpu_link" not in values:
        changes["gpu_link"] = "none"
    changes |= {"gpus": gpus, "num_nodes": values.get("nodes", 1)}
    described = Machine(**{**_fields(machine), **changes})
    if described.host_free_gib > described.host_gib:
        raise reader.error("host_free", mapping.get("host_free"), f"at most host_memory ({described.host_gib:g} GiB)")
    return described


def _plain_machine(mapping: Mapping[str, Any], values: dict[str, Any], reader: _Reader) -> tuple[Machine, tuple]:
    """The assumptions for the cards that were named, and the cards."""
    card, num_gpus, num_nodes = mapping.get("card"), values.get("gpus"), values.get("nodes", 1)
    if card is None:
        if num_gpus:
            raise reader.error("card", None, "the name of the card, such as v100-32g")
        return plain_computer(), ()
    if isinstance(card, list):
        if num_gpus not in (None, len(card)):
            raise reader.error("gpus", num_gpus, f"{len(card)}, the length of the list card, or nothing")
        each = [reader.card(f"card.{number}", one) for number, one in enumerate(card)]
    else:
        each = [reader.card("card", card)] * (1 if num_gpus is None else num_gpus)
    if not each:
        return plain_computer(), ()
    machine = machine_of(
        each[0][0], name=each[0][1].name.lower().replace(" ", ""), num_gpus=len(each), num_nodes=num_nodes
    )
    return machine, tuple(gpu for _, gpu in each)


def _fields(machine: Machine) -> dict[str, Any]:
    return {name: getattr(machine, name) for name in Machine.__dataclass_fields__}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _count(most: int, *, least: int = 1) -> Callable[[Any], int | None]:
    return lambda value: value if type(value) is int and least <= value <= most else None


def _positive(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 < value < 1e9 else None


UNITS = {"": 1.0, "gib": 1.0, "g": 1.0, "gi": 1.0, "gb": 1e9 / 2**30, "tib": 1024.0, "t": 1024.0, "tb": 1e12 / 2**30,
         "mib": 1 / 1024, "mb": 1e6 / 2**30}  # fmt: skip


def _memory(value: Any) -> float | None:
    """GiB of 512, `512 GiB`, `64GB` or `2 TiB`."""
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())):
        unit = UNITS.get(found[2])
        value = None if unit is None else float(found[1]) * unit
    return _positive(value)


def _capability(value: Any) -> tuple[int, int] | None:
    found = re.fullmatch(r"(?:sm_)?(\d{1,2})\.(\d)|sm_(\d{1,2})(\d)", str(value))
    return (int(found[1] or found[3]), int(found[2] or found[4])) if found else None


def _choice(*names: str) -> Callable[[Any], str | None]:
    return lambda value: value if value in names else None


def _flags(value: Any) -> frozenset[str] | None:
    is_list = isinstance(value, list) and all(isinstance(flag, str) for flag in value)
    return frozenset(flag.lower() for flag in value) if is_list else None


Read = tuple[Callable[[Any], Any], str]
MEMORY: Read = (_memory, "an amount such as 512 GiB (a bare number is GiB)")
RATE: Read = (_positive, "a number above 0")
FIELDS: dict[str, Read | None] = {
    "name": (_text, "text"),
    "card": None,
    "gpus": (_count(MOST_CARDS, least=0), f"a whole number from 0 to {MOST_CARDS}, the cards of one node"),
    "nodes": (_count(MOST_NODES), f"a whole number from 1 to {MOST_NODES}"),
    "cores": (_count(4096), "a whole number from 1 to 4096"),
    "cpu_flags": (_flags, "a list such as [avx2, avx512f]"),
    "host_memory": MEMORY,
    "host_free": MEMORY,
    "shared_memory": MEMORY,
    "disk_free": MEMORY,
    "gpu_link": (_choice("nvlink", "pcie", "none"), "nvlink, pcie or none"),
    "node_link": (_positive, "a number above 0, in GB/s"),
}
OWN_NAMES = {
    "name": "name", "cores": "cpu_cores", "cpu_flags": "cpu_flags", "host_memory": "host_gib",
    "host_free": "host_free_gib", "shared_memory": "shared_memory_gib", "disk_free": "disk_free_gib",
    "gpu_link": "gpu_link", "node_link": "node_link_gb_per_s",
}  # fmt: skip
CARD_FIELDS: dict[str, Read] = {
    "name": (_text, "text"),
    "memory": MEMORY,
    "capability": (_capability, 'a compute capability such as "8.6" or sm_86'),
    "vendor": (_choice("nvidia", "amd", "other"), "nvidia, amd or other"),
    "bandwidth": (_positive, "a number above 0, in GB/s"),
    "half_tflops": RATE,
}


class _Reader:
    """Reads fields of one description and words its errors."""

    def __init__(self, where: str, lines: Mapping[str, int]) -> None:
        self.where, self.lines = where, lines

    def place(self, field: str) -> str:
        return f"{self.where}:{self.lines[field]}" if field in self.lines else f"{self.where}, field {field}"

    def error(self, field: str, value: Any, expected: str) -> UserError:
        what = f"{field}: {_shown(value)}" if value is not None else f"{field} is missing or empty"
        return UserError(what, expected=expected, fix=f"correct {field}", where=self.place(field))

    def require_known(self, mapping: Mapping[Any, Any], fields: Mapping[str, Any], above: str) -> None:
        for key in mapping:
            if key not in fields:
                near = get_close_matches(str(key).replace("num_", ""), fields, n=1, cutoff=0.5)
                raise UserError(
                    f"unknown field {above}{key}",
                    expected=f"one of {', '.join(fields)}",
                    fix=f"did you mean {near[0]}?" if near else f"remove {key}",
                    where=self.place(f"{above}{key}"),
                )

    def read(self, field: Read | None, name: str, value: Any) -> Any:
        assert field is not None
        convert, expected = field
        found = convert(value)
        if found is None:
            raise self.error(name, value, expected)
        return found

    def card(self, field: str, value: Any) -> tuple[Card, Gpu]:
        """A card by name, or described by its numbers; the rest comes from the table if that knows the name."""
        if isinstance(value, str):
            card = card_of(value, where=self.place(field))
            return card, gpu_of(card)
        if not isinstance(value, Mapping) or not value:
            raise self.error(field, value, "the name of a card, or a mapping with name, memory and capability")
        self.require_known(value, CARD_FIELDS, f"{field}.")
        own = {key: self.read(CARD_FIELDS[key], f"{field}.{key}", one) for key, one in value.items()}
        missing = [key for key in ("memory", "capability") if key not in own]
        if missing:
            if "name" not in own:
                raise self.error(f"{field}.{missing[0]}", None, "memory and capability, or the name of a known card")
            known = card_of(own["name"], where=self.place(f"{field}.name"))
        else:
            known = None
        return _described_card(own, known)


def _described_card(own: dict[str, Any], known: Card | None) -> tuple[Card, Gpu]:
    capability = own.get("capability") or (known.capability if known else (0, 0))
    memory_gib = own.get("memory") or (known.memory_gib if known else 0.0)
    card = Card(
        chip=known.chip if known else own.get("name", "card").lower(),
        size_gb=known.size_gb if known else round(memory_gib),
        memory_gib=memory_gib,
        capability=capability,
        half_tflops=own.get("half_tflops") or (known.half_tflops if known else 0.0),
        bandwidth_gb_per_s=own.get("bandwidth") or (known.bandwidth_gb_per_s if known else 0.0),
        form=known.form if known else "pcie",
        has_nvlink=known.has_nvlink if known else False,
        vendor=own.get("vendor") or (known.vendor if known else "nvidia"),
    )
    gpu = Gpu(
        name=own.get("name", card.chip),
        memory_gib=card.memory_gib,
        capability=card.capability,
        vendor=card.vendor,
        bandwidth_gb_per_s=card.bandwidth_gb_per_s,
        half_tflops=card.half_tflops,
    )
    return card, gpu


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

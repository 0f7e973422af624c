"""`zhibei pitfalls`: the catalogue as a list, and the page of one. Knows how they are shown, not what they find."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.config.errors import UserError

if TYPE_CHECKING:
    from zhibei.doctor.page import Language
    from zhibei.doctor.pitfall import Pitfall

KIND_STYLES = {
    "check": "green",
    "gate": "green",
    "rehearsal": "cyan",
    "watchdog": "cyan",
    "construction": "dim",
    "explained": "yellow",
}


def pitfalls(
    id: str = "",
    /,
    *,
    area: str = "",
    lang: Literal["en", "zh", ""] = "",
    json: bool = False,
) -> None:
    """Read about the known pits.

    Each page says what goes wrong, why, what to do, and how zhibei catches it.

    Examples:

      zhibei pitfalls
      zhibei pitfalls --area labels
      zhibei pitfalls lora-target-typo-ignored
      zhibei pitfalls lora-target-typo-ignored --lang zh

    Parameters
    ----------
    id
        The name of one pitfall, as `zhibei check` prints it: shows its page.
    area
        Only the pitfalls of one area.
    lang
        en or zh; by default Chinese where LANG says so.
    json
        One JSON document.
    """
    from zhibei.doctor.page import as_dict, as_text
    from zhibei.doctor.pitfalls import AREAS, load_catalogue

    catalogue = load_catalogue()
    language = lang or _language_of_terminal()
    if id:
        found = catalogue.get(id) or _unknown(id, list(catalogue), "pitfall", "zhibei pitfalls lists them")
        console.emit(as_dict(found) if json else Text(as_text(found, language)), as_json=json)
        return
    if area and area not in AREAS:
        _unknown(area, list(AREAS), "area", f"one of {', '.join(AREAS)}")
    chosen = [one for one in catalogue.values() if area in ("", one.area)]
    if json:
        console.emit({"pitfalls": [as_dict(one) for one in chosen], "kinds": _counted(chosen)}, as_json=True)
        return
    console.stdout.print(_table(chosen, language))
    counted = ", ".join(f"{number} {kind}" for kind, number in _counted(chosen).items())
    console.stdout.print(f"\n{len(chosen)} pitfalls: {counted}. One page: zhibei pitfalls ID")


def _language_of_terminal() -> Language:
    """Chinese where the variables of the locale say so, by their own order of precedence."""
    said = next((os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "")
    return "zh" if said.lower().startswith("zh") else "en"


def _unknown(name: str, known: list[str], kind: str, expected: str) -> Pitfall:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    raise UserError(
        f"there is no {kind} {name!r}",
        expected=expected,
        fix=f"did you mean {near[0]}?" if near else "see  zhibei pitfalls",
    )


def _counted(chosen: list[Pitfall]) -> dict[str, int]:
    return {
        kind: sum(one.kind == kind for one in chosen) for kind in KIND_STYLES if any(one.kind == kind for one in chosen)
    }


def _table(chosen: list[Pitfall], language: Language) -> Table:
    from zhibei.doctor.page import page_of

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    area = ""
    for one in chosen:
        if one.area != area:
            area = one.area
            table.add_row(Text(f"\n{area}", style="bold"), "", "")
        table.add_row(f"  {one.id}", Text(one.kind, style=KIND_STYLES[one.kind]), page_of(one, language).title)
    return table

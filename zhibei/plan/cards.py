"""The cards people train on, as their data sheets and drivers describe them. Knows no machine around them.

Memory is what a program can use: what torch reports as the total of the card (driver 535 and newer, ECC as shipped).
It lies 0.2 to 3 GiB below the size in the name. Rates are dense peaks without sparsity. For GeForce cards the half
rate is that with fp32 accumulation, which is how torch multiplies; there it is half of the rate on the box. Pascal
cards multiply halves at their fp32 rate. Laptop rates hold at the top of the card's power range.

Sources: NVIDIA's data sheets of V100, T4, P40, P100, A10, A30, A40, A100, L4, L40S, H100, H200, GH200, B200 and of
the RTX workstation cards; the GA102, AD102 and RTX Blackwell white papers; AMD's data sheets of the MI series; AWS for
the A10G.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from zhibei.config.errors import UserError

Vendor = Literal["nvidia", "amd", "other"]


@dataclass(frozen=True, slots=True)
class Card:
    """One kind of card. `size_gb` is the size in its name; `form` tells boards of one chip apart; `is_usual` is the one
    meant when the size is left out."""

    chip: str
    size_gb: int
    memory_gib: float
    capability: tuple[int, int]
    half_tflops: float
    bandwidth_gb_per_s: float
    form: Literal["sxm", "pcie", "nvl"] = "pcie"
    has_nvlink: bool = False
    vendor: Vendor = "nvidia"
    is_usual: bool = True

    @property
    def key(self) -> str:
        """As a person types it: `v100-32g`, `a100-80g-pcie`, `rtx4090`, `t4`."""
        sizes = {card.size_gb for card in CARDS if card.chip == self.chip}
        first = next(card for card in CARDS if card.chip == self.chip and card.size_gb == self.size_gb)
        size = f"-{self.size_gb}g" if len(sizes) > 1 or self.chip in ("v100", "a100", "h100") else ""
        return f"{self.chip}{size}{'' if self == first else '-' + self.form}"

    @property
    def name(self) -> str:
        """As a page shows it: `V100-32G`, `RTX 4070 Ti Super`, `T4`."""
        name = re.sub(r"^RTX(?=\d)", "RTX ", self.key.upper())
        return re.sub(r"(?<=\d)(?=TI|SUPER|LAPTOP|ADA)|(?<=TI)(?=SUPER)", " ", name).replace("TI", "Ti")


def _pair(chip: str, size_gb: int, memory_gib: float, capability: tuple[int, int], **rates: float) -> tuple[Card, Card]:
    """The module with NVLink, and the board for a PCIe slot."""
    sxm = Card(
        chip, size_gb, memory_gib, capability, rates["sxm"], rates["sxm_bandwidth"], form="sxm", has_nvlink=True,
        is_usual=chip == "h100",
    )  # fmt: skip
    pcie = Card(chip, size_gb, memory_gib, capability, rates["pcie"], rates["pcie_bandwidth"], is_usual=chip == "h100")
    return sxm, pcie


PASCAL, VOLTA, TURING, AMPERE, GA10X, ADA, HOPPER = (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)
BLACKWELL, RTX_BLACKWELL, CDNA2, CDNA3 = (10, 0), (12, 0), (9, 0), (9, 4)

# Of two cards that fit a name equally well, the first is meant.
CARDS: tuple[Card, ...] = (
    *_pair("v100", 32, 31.7, VOLTA, sxm=125, sxm_bandwidth=900, pcie=112, pcie_bandwidth=900),
    *_pair("v100", 16, 15.8, VOLTA, sxm=125, sxm_bandwidth=900, pcie=112, pcie_bandwidth=900),
    Card("t4", 16, 14.6, TURING, 65, 320),
    Card("p100", 16, 15.9, (6, 0), 21.2, 732, form="sxm", has_nvlink=True),
    Card("p100", 16, 15.9, (6, 0), 18.7, 732),
    Card("p40", 24, 22.4, PASCAL, 11.8, 346),
    Card("rtx1080ti", 11, 10.9, PASCAL, 11.3, 484),
    Card("rtx2080ti", 11, 10.7, TURING, 53.8, 616),
    Card("rtx2080ti", 22, 21.5, TURING, 53.8, 616, is_usual=False),
    Card("rtx3060", 12, 11.6, GA10X, 25.5, 360),
    Card("rtx3070", 8, 7.7, GA10X, 40.6, 448),
    Card("rtx3080", 10, 9.7, GA10X, 59.5, 760),
    Card("rtx3080", 12, 11.6, GA10X, 61.3, 912, is_usual=False),
    Card("rtx3080ti", 12, 11.6, GA10X, 68.2, 912),
    Card("rtx3090", 24, 23.6, GA10X, 71, 936),
    Card("rtx3090ti", 24, 23.6, GA10X, 80, 1008),
    Card("a10", 24, 22.1, GA10X, 125, 600),
    Card("a10g", 24, 22.1, GA10X, 70, 600),
    Card("a30", 24, 23.5, AMPERE, 165, 933),
    Card("a40", 48, 44.4, GA10X, 149.7, 696),
    Card("a4000", 16, 15.6, GA10X, 76.7, 448),
    Card("a5000", 24, 23.6, GA10X, 111, 768),
    Card("a6000", 48, 47.4, GA10X, 154.8, 768),
    *_pair("a100", 40, 39.4, AMPERE, sxm=312, sxm_bandwidth=1555, pcie=312, pcie_bandwidth=1555),
    *_pair("a100", 80, 79.2, AMPERE, sxm=312, sxm_bandwidth=2039, pcie=312, pcie_bandwidth=1935),
    Card("rtx4060", 8, 7.6, ADA, 30.2, 272),
    Card("rtx4060ti", 8, 7.6, ADA, 44.1, 288, is_usual=False),
    Card("rtx4060ti", 16, 15.6, ADA, 44.1, 288, is_usual=False),
    Card("rtx4070", 12, 11.6, ADA, 58.3, 504),
    Card("rtx4070ti", 12, 11.6, ADA, 80.2, 504),
    Card("rtx4080", 16, 15.6, ADA, 97.5, 717),
    Card("rtx4070super", 12, 11.6, ADA, 71, 504),
    Card("rtx4070tisuper", 16, 15.6, ADA, 88.2, 672),
    Card("rtx4080super", 16, 15.6, ADA, 104.4, 736),
    Card("rtx4090", 24, 23.5, ADA, 165.2, 1008),
    Card("l4", 24, 22.0, ADA, 121, 300),
    Card("l40", 48, 44.4, ADA, 181, 864),
    Card("l40s", 48, 44.4, ADA, 362, 864),
    Card("rtx6000ada", 48, 47.4, ADA, 364, 960),
    Card("rtx5070", 12, 11.5, RTX_BLACKWELL, 61.7, 672),
    Card("rtx5070ti", 16, 15.5, RTX_BLACKWELL, 87.9, 896),
    Card("rtx5080", 16, 15.5, RTX_BLACKWELL, 112.6, 960),
    Card("rtx5090", 32, 31.3, RTX_BLACKWELL, 209.5, 1792),
    Card("rtx3060laptop", 6, 5.8, GA10X, 26, 336),
    Card("rtx4060laptop", 8, 7.6, ADA, 23, 256),
    Card("rtx4070laptop", 8, 7.6, ADA, 31, 256),
    Card("rtx4080laptop", 12, 11.6, ADA, 49, 432),
    Card("rtx4090laptop", 16, 15.6, ADA, 66, 576),
    *_pair("h100", 80, 79.1, HOPPER, sxm=989, sxm_bandwidth=3350, pcie=756, pcie_bandwidth=2000),
    Card("h100", 94, 93.0, HOPPER, 835, 3900, form="nvl", has_nvlink=True, is_usual=False),
    Card("h200", 141, 139.7, HOPPER, 989, 4800, form="sxm", has_nvlink=True),
    Card("gh200", 96, 94.5, HOPPER, 989, 4000, form="sxm", has_nvlink=True),
    Card("gh200", 144, 141.0, HOPPER, 989, 4900, form="sxm", has_nvlink=True, is_usual=False),
    Card("b200", 180, 178.3, BLACKWELL, 2250, 8000, form="sxm", has_nvlink=True),
    Card("mi210", 64, 63.9, CDNA2, 181, 1638, vendor="amd"),
    # One of the two halves, since programs see each as a card of its own.
    Card("mi250x", 64, 63.9, CDNA2, 191.5, 1638, form="sxm", has_nvlink=True, vendor="amd"),
    Card("mi300x", 192, 191.5, CDNA3, 1307, 5300, form="sxm", has_nvlink=True, vendor="amd"),
)
CHIPS = tuple(dict.fromkeys(card.chip for card in CARDS))

# Words of a driver's name for a card that do not tell it from another one.
IDLE_WORDS = {
    "nvidia", "tesla", "geforce", "quadro", "amd", "instinct", "radeon", "rtx", "gtx", "gpu", "graphics", "device",
    "generation", "hbm2", "hbm2e", "hbm3", "hbm3e", "oam", "ampere",
}  # fmt: skip
FORMS = {"sxm": "sxm", "sxm2": "sxm", "sxm3": "sxm", "sxm4": "sxm", "sxm5": "sxm", "pcie": "pcie", "nvl": "nvl"}
SIZE = re.compile(r"(\d+)(g|gb|gib)")


def card_of(text: str, *, where: str = "") -> Card:
    """The card a person or a driver means: `v100-32g`, `A100-80GB`, `4090`, `NVIDIA A100-SXM4-80GB`.

    Raises UserError with the nearest names for one that is not in the table, and with the sizes when the size decides.
    """
    chip, form, size = _parts(text)
    if chip not in CHIPS:
        raise _unknown(text, chip, where)
    cards = [card for card in CARDS if card.chip == chip and form in (None, card.form)]
    if not cards:
        forms = sorted({card.form for card in CARDS if card.chip == chip})
        raise UserError(
            f"{text!r}: there is no {chip} as {form}", expected=" or ".join(forms), fix=f"write {chip}", where=where
        )
    sized = [card for card in cards if size in (None, card.size_gb)]
    sizes = sorted({card.size_gb for card in cards})
    if not sized:
        raise UserError(
            f"{text!r}: there is no {chip} with {size} GB",
            expected=_either(f"{one} GB" for one in sizes),
            fix=f"write {_either(f'{chip}-{one}g' for one in sizes)}",
            where=where,
        )
    usual = [card for card in sized if card.is_usual or size is not None or len(sizes) == 1]
    if not usual:
        raise UserError(
            f"{text!r}: this card is sold with {_either(f'{one} GB' for one in sizes)}",
            expected="the memory size too, since it decides what fits",
            fix=f"write {_either(f'{chip}-{one}g' for one in sizes)}",
            where=where,
        )
    return usual[0]


def known_card(name: str, memory_gib: float) -> Card | None:
    """The table's row for a card that a driver names, or None. The memory it reports decides between sizes."""
    chip, form, _ = _parts(name.split("/")[0])  # AMD Instinct MI250X / MI250
    cards = [card for card in CARDS if card.chip == chip]
    near = [card for card in cards if abs(card.memory_gib - memory_gib) < 0.1 * card.memory_gib]
    exact = [card for card in near if card.form == form]
    return next(iter(exact or near), None)


def _parts(text: str) -> tuple[str, str | None, int | None]:
    """(chip, form, size in GB) of a name; the chip may be one that nobody knows."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    # A glued prefix (rtx4090, rtxa6000, teslat4) and a glued size (v100-32g is split already, a10080g is not read).
    words = [re.sub(r"^(nvidia|tesla|geforce|rtx|gtx)+(?=[a-z]?\d)", "", word) for word in words]
    words = [word for word in words if word and word not in IDLE_WORDS]
    form = next((FORMS[word] for word in words if word in FORMS), None)
    size = next((int(found[1]) for word in words if (found := SIZE.fullmatch(word))), None)
    rest = [word for word in words if word not in FORMS and not SIZE.fullmatch(word)]
    if size is None and len(rest) > 1 and rest[-1].isdigit():  # a100-80
        size = int(rest.pop())
    chip = "".join(rest)
    return (f"rtx{chip}" if f"rtx{chip}" in CHIPS else chip), form, size


def _unknown(text: str, chip: str, where: str) -> UserError:
    near = get_close_matches(chip, CHIPS, n=3, cutoff=0.5) or get_close_matches(f"rtx{chip}", CHIPS, n=3, cutoff=0.5)
    hint = f"did you mean {_either(near)}? " if near else ""
    return UserError(
        f"no card called {text!r} is known",
        expected=f"one of {', '.join(CHIPS)}",
        fix=f"{hint}Or describe the machine in a YAML file (card: {{name, memory, capability}}) and give its path",
        where=where,
    )


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)

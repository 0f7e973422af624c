"""A refusal that names its pitfall names one of the catalogue, and is shown under that name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import zhibei
from tests.text.small_tokenizers import byte_level
from zhibei.config.errors import UserError
from zhibei.doctor.checkup import found_of
from zhibei.doctor.pitfalls import load_catalogue
from zhibei.text.families import find_template
from zhibei.text.messages import Message

NAMED = re.compile(r'pitfall(?:: str)? ?= ?"([a-z0-9-]+)"')


def test_every_name_is_in_the_catalogue() -> None:
    assert zhibei.__file__ is not None
    sources = Path(zhibei.__file__).parent.rglob("*.py")
    named = {name for path in sources for name in NAMED.findall(path.read_text(encoding="utf-8"))}
    assert {"roles-must-alternate", "turn-boundary-search-failure", "weights-not-finite"} <= named
    assert named - load_catalogue().keys() == set()


def test_a_refused_conversation_is_found_under_its_pitfall() -> None:
    template = find_template("alpaca", byte_level())
    with pytest.raises(UserError) as refusal:
        template.render([Message("user", "a"), Message("user", "b")])
    found = found_of(refusal.value)
    assert (found.id, found.area, found.blocks) == ("roles-must-alternate", "template", True)

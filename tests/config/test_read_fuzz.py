"""Whatever stands in a run file or on the command line: it is read, or refused with a UserError that has a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zhibei.config.errors import SeveralErrors, UserError
from zhibei.config.read import read_run, recipe_text
from zhibei.config.resolve import ResolvedRun, yaml_value
from zhibei.config.words import leaf_fields

KEYS = [key for key, _ in leaf_fields()]
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def read_or_refuse(given_run: str | Path, overrides: list[str]) -> ResolvedRun | UserError:
    try:
        return read_run(given_run, overrides)
    except UserError as error:
        for part in error.errors if isinstance(error, SeveralErrors) else [error]:
            assert part.what
            assert part.expected
            assert part.fix
        return error


@QUIET
@given(st.data())
def test_damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    text = recipe_text("alpaca-lora-7b")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 8)))
    middle = data.draw(st.text(alphabet="\t\n :-[]{}&*!|>'\"#%@`,?a0é\x07指", max_size=6))
    path = tmp_path / "run.yaml"
    path.write_text(text[:start] + middle + text[end:], encoding="utf-8")
    read_or_refuse(path, [])


@QUIET
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(raw)
    assert isinstance(read_or_refuse(path, []), UserError)


@QUIET
@given(st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=3))
def test_any_values_on_the_command_line(settings_given: list[tuple[str, object]]) -> None:
    read_or_refuse("alpaca-lora-7b", [f"{key}={yaml_value(value)}" for key, value in settings_given])


@QUIET
@given(st.text(max_size=20))
def test_any_text_as_a_setting_or_a_path(text: str) -> None:
    read_or_refuse("alpaca-7b", [text])
    if text not in ("", "."):
        assert isinstance(read_or_refuse(text, []), UserError)


def test_the_check_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zhibei.config.read.RunFile.model_validate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_or_refuse("alpaca-7b", [])

"""More preference data that cannot teach a preference: other formats, other fields. Knows no verdict."""

from __future__ import annotations

from typing import Any

from tests.bad_inputs.pair_cases import pairs
from tests.bad_inputs.place import Place, alpaca_rows, pair_rows
from tests.bad_inputs.scenario import Build, Scenario

PLACE = r"rows\.json\S*(#|, record )\d+"


def _every(field: str, value: Any) -> Any:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row[field] = value(row) if callable(value) else value

    return change


def _one(field: str, value: Any) -> Any:
    return lambda rows: rows[17].update({field: value})


def _as_messages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's form, and both answers of record 17 alike."""
    made = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
    made[17]["rejected"] = made[17]["chosen"]
    return made


def _as_hh(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """hh-rlhf's form, and both answers of every record alike."""
    text = "\n\nHuman: {prompt}\n\nAssistant: {chosen}"
    return [{"chosen": text.format(**row), "rejected": text.format(**row)} for row in rows]


def _as_kto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]


def _long_prompts(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["prompt"] = row["prompt"] * 40


def _alpaca(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return alpaca_rows()


def trained(build: Build) -> Build:
    """The same, and `zhibei train` is asked."""

    def with_train(place: Place) -> None:
        build(place)
        place.verb = "train"

    return with_train


def _pairs_for_sft(place: Place) -> None:
    place.rows = pair_rows()


PAIR_VARIANTS = [
    Scenario(
        "v_r_spaces_only",
        "Both answers differ by a space.",
        pairs("dpo", _every("rejected", lambda row: row["chosen"] + " ")),
        value=("spac|blank", r"\b(60|59)\b"),
        where=PLACE,
        remedy="to do:.*",
    ),
    Scenario(
        "v_r_chosen_empty",
        "An empty chosen answer.",
        pairs("reward", _one("chosen", "  ")),
        value="empty",
        where=r"record 17 \(line \d+\), field 'chosen'",
        remedy="on_error: drop",
    ),
    Scenario(
        "v_r_rejected_null",
        "null for the rejected answer.",
        pairs("dpo", _one("rejected", None)),
        value="null",
        where=r"record 17 \(line \d+\), field 'rejected'",
        remedy="to do:.*",
    ),
    Scenario(
        "v_r_rejected_number",
        "A number for the rejected answer.",
        pairs("reward", _one("rejected", 3.5)),
        value=r"3\.5",
        where=r"record 17 \(line \d+\), field 'rejected'",
        remedy="to do:.*",
    ),
    Scenario(
        "v_r_messages_equal_one",
        "One pair of equal answers, written as messages.",
        pairs("dpo", _as_messages),
        value="equal|identical|same",
        where=r"record 17 \(line \d+\), field 'rejected",
        remedy="on_error: drop",
    ),
    Scenario(
        "v_r_hh_equal_all",
        "Equal answers in every row of hh-rlhf's form.",
        pairs("reward", _as_hh),
        value=("equal|identical|same", r"\b(60|59)\b"),
        where=r"rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "v_r_kto_one_label",
        "Judged single answers, every one of them with a thumb up.",
        pairs("dpo", _as_kto),
        value=("label", r"\b60\b", "true"),
        where="field 'label'",
        remedy="to do:.*",
    ),
    Scenario(
        "v_r_instructions_for_dpo",
        "Instructions where pairs are needed.",
        pairs("dpo", _alpaca),
        value="chosen|pair|preference",
        where=r"rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "v_r_pairs_for_sft",
        "Pairs where conversations are needed.",
        _pairs_for_sft,
        value="pair|preference|chosen",
        where=r"rows\.json",
        remedy="to do:.*",
        may=("stopped",),
    ),
    Scenario(
        "v_r_prompt_fills_window",
        "Prompts that leave no room for an answer.",
        pairs("dpo", _long_prompts, data__too_long="cut"),
        value=r"\b256\b|window|room",
        where=rf"max_tokens|{PLACE}",
        remedy="to do:.*max_tokens",
    ),
    Scenario(
        "v_r_rejected_field_renamed",
        "The rejected answer under another name.",
        pairs("dpo", lambda rows: [row.update(reject=row.pop("rejected")) for row in rows]),
        value="reject",
        where=r"rows\.json",
        remedy="columns|rejected",
    ),
    Scenario(
        "v_r_lr_huge",
        "A learning rate of 0.3 for DPO.",
        lambda place: [pairs("dpo")(place), place.set("dpo.learning_rate", 0.3)],
        value=r"\b0\.3\b",
        where=r"run\.yaml:\d+",
        remedy="to do:.*e-",
        may=("stopped", "warned"),
    ),
    Scenario(
        "v_r_without_prompt",
        "Pairs without a prompt.",
        pairs("dpo", lambda rows: [row.pop("prompt") for row in rows]),
        value="prompt",
        where=r"rows\.json",
        remedy="to do:.*",
    ),
]

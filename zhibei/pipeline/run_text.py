"""Settings as the text of a run file that a person can read and run again. Knows YAML, no field."""

from __future__ import annotations

from typing import Any

from zhibei.config.resolve import yaml_value

Settings = dict[str, Any]


def run_file_text(settings: Settings, *, about: str) -> str:
    """One line per setting below its section, headed by a comment."""
    lines = [f"# {about}"]
    for key, value in sorted(settings.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict):
            lines += ["", f"{key}:", *(f"  {name}: {yaml_value(inner)}" for name, inner in value.items())]
        else:
            lines.append(f"{key}: {yaml_value(value)}")
    return "\n".join(lines) + "\n"

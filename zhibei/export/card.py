"""The model card (README.md) of a folder that is handed over: what is recorded, and what is not, said so.

Nothing is invented: a licence stands here only where a file names one, a figure only where a run measured it. Paths of
this machine are left out; files are named by name and hash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zhibei.store.files import read_json
from zhibei.store.manifest import read_manifest
from zhibei.store.run_dir import RunDir

HEAD_LINE = re.compile(r"^(license|license_name|license_link|language|base_model):\s*(\S.*)$")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md")
UNKNOWN = "not recorded; find out before you publish"
FIGURES = {
    "best_heldout_loss": "held-out loss (nats per learned token)",
    "best_heldout_reward": "held-out reward",
    "steps": "optimiser steps",
    "tokens": "tokens read",
    "learned_tokens": "tokens learned",
    "training_seconds": "training time (seconds)",
}


def licence_beside(folder: Path) -> dict[str, str]:
    """`license` and kin as the head of a README.md states them, and a licence's file; empty when nothing does."""
    found: dict[str, str] = {}
    readme = folder / "README.md"
    if readme.is_file():
        lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines[:1] == ["---"]:
            for line in lines[1:]:
                if line == "---":
                    break
                if match := HEAD_LINE.match(line):
                    found[match.group(1)] = match.group(2)
    file = next((name for name in LICENCE_FILES if (folder / name).is_file()), None)
    return found | ({"file": file} if file else {})


def write_card(
    folder: Path, *, name: str, base: Path | None, run: RunDir | None, parity: Mapping[str, Any] | None = None
) -> None:
    """Write README.md for a complete model folder, from its base, the manifest of its run and the parity report."""
    manifest = read_manifest(run.path) if run is not None and run.manifest.is_file() else {}
    licence = licence_beside(base) if base is not None else {}
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"{key}: {licence[key]}" for key in ("license", "license_name", "license_link") if key in licence]
    named = str((manifest.get("base") or {}).get("path") or "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not Path(named).exists():
        lines.append(f"base_model: {named}")
    lines += ["---", "", f"# {name}", ""]
    lines += _origin(manifest, base, licence)
    lines += _data(manifest)
    lines += _figures(manifest)
    lines += _loading(folder, manifest)
    lines += _parity(parity)
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _origin(manifest: Mapping[str, Any], base: Path | None, licence: Mapping[str, str]) -> list[str]:
    lines = []
    if base is not None:
        fingerprint = (manifest.get("base") or {}).get("fingerprint")
        lines.append(f"- Base model: {base.name}" + (f", fingerprint `{fingerprint}`" if fingerprint else ""))
        words = licence.get("license") or (f"see {licence['file']}" if "file" in licence else UNKNOWN)
        lines.append(f"- Licence of the base: {words}")
    if manifest:
        how = f"method {manifest.get('method')}, {manifest.get('precision')}, seed {manifest.get('seed')}"
        rows = f"global batch {manifest.get('global_batch')}, rows of at most {manifest.get('max_tokens')} tokens"
        lines.append(f"- Trained with zhibei {manifest.get('zhibei')}: {how}, {rows}")
        lines.append(f"- Run `{manifest.get('run_id')}`, begun {manifest.get('created')}")
    else:
        lines.append("- How it was trained is not recorded: this folder was not made from a run of zhibei.")
    return [*lines, ""]


def _data(manifest: Mapping[str, Any]) -> list[str]:
    if not manifest:
        return []
    lines = ["## Data", "", "| file | bytes | SHA-256 | licence |", "| --- | ---: | --- | --- |"]
    for entry in manifest.get("data") or []:
        path = Path(str(entry.get("path") or "?"))
        licence = licence_beside(path.parent) if path.parent.is_dir() else {}
        words = licence.get("license") or (f"see {licence['file']} beside it" if "file" in licence else UNKNOWN)
        size, digest = entry.get("bytes"), entry.get("sha256") or entry.get("revision") or ""
        lines.append(f"| {path.name} | {f'{size:,}' if isinstance(size, int) else ''} | `{digest}` | {words} |")
    return [*lines, ""]


def _figures(manifest: Mapping[str, Any]) -> list[str]:
    finished = manifest.get("finished") or {}
    rows = [(label, finished[key]) for key, label in FIGURES.items() if finished.get(key) is not None]
    heldout = finished.get("heldout") or {}
    rows += [(f"held-out: {key}", value) for key, value in heldout.items() if isinstance(value, (int, float))]
    if not rows:
        return []
    shown = [f"| {label} | {value:,.6g} |" for label, value in rows]
    return ["## Figures of the run", "", "| figure | value |", "| --- | ---: |", *shown, ""]


def _loading(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    template = (manifest.get("template") or {}).get("name")
    has_template = (folder / "chat_template.jinja").is_file() or "chat_template" in _tokenizer_settings(folder)
    lines = ["## How to use it", ""]
    if has_template:
        named = f"`{template}`, as trained" if template else "the tokenizer's own"
        lines.append(f"The prompt template ({named}) is in the tokenizer; other prompts give worse answers.")
        prompt = 'tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True, '
        ask = [f'inputs = {prompt}return_tensors="pt", return_dict=True)']
    else:
        lines.append("No prompt template is recorded: this model continues text.")
        ask = ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
        *ask,
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))",
    ]
    return [*lines, "", "```python", *code, "```", ""]


def _tokenizer_settings(folder: Path) -> Mapping[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _parity(parity: Mapping[str, Any] | None) -> list[str]:
    if not parity:
        return []
    facts = {
        "KL, mean (nats per token)": f"{parity['kl_mean']:.3g}",
        "likeliest token agrees": f"{parity['top1_agreement']:.2%}",
        "perplexity": f"{parity['reference']['perplexity']:.5g} -> {parity['other']['perplexity']:.5g}",
        "compared on": f"{parity['num_tokens']:,} tokens ({parity['rows_from']})",
    }
    shown = [f"| {label} | {value} |" for label, value in facts.items()]
    return ["## Compared with what it was made from", "", "| figure | value |", "| --- | --- |", *shown, ""]


def open_points(folder: Path) -> list[str]:
    """Lines of the card that say what is not recorded, for the person who publishes it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if UNKNOWN in line]

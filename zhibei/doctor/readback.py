"""What a new process says of a rehearsal's save, judged: tensors, logits, tokenizer, prompt, the resumed loss.

Knows request.json and answer.json of `zhibei.doctor.fresh`, not the model.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.doctor.pitfall import Finding
from zhibei.doctor.probes import SUM_BOUNDS
from zhibei.doctor.scene import Seen
from zhibei.store.files import read_json

FRESH_SECONDS = 1800


def reload(folder: Path, answer: dict[str, Any]) -> Seen:
    """A new process reads the written model; tensors and logits must be the ones that were in memory."""
    answer.update(run_fresh(folder))
    request, found = read_json(folder / "request.json"), answer["reload"]
    if "problem" in found:
        finding = Finding(f"the written model cannot be used: {found['problem']}", "the written model", found["to_do"])
        return Seen(found["problem"], [("tokenizer-not-saved-with-model", finding)])
    problems: list[tuple[str, Finding]] = []

    def wrong(pitfall: str, what: str, to_do: str, names: tuple[str, ...] = ()) -> None:
        problems.append((pitfall, Finding(what, "the written model", to_do, evidence=names)))

    if found["num_differing"]:
        wrong(
            "fsdp-save-missing-layers",
            f"{found['num_differing']:,} of {found['tensors']:,} tensors are not as they were in memory",
            "report it with these names; with tied embeddings leave lora.modules_to_save empty",
            tuple(found["differing"]),
        )
    if found["non_finite"]:
        wrong("", "weights that are not finite were read back", "set model.precision: fp32", tuple(found["non_finite"]))
    bound = (1e-4 if request["precision"] == "fp32" else 5e-2) * max(1.0, found["scale"])
    if found["difference"] is None or not found["difference"] <= bound:
        wrong(
            "ppo-wrapper-prefix-in-checkpoint",
            f"logits differ by {found['difference']} after reading the model back",
            "report it: what was written is not the trained model",
        )
    if found["tokenizer"] != request["tokenizer"] or _written_ids(found) != request["probe_ids"]:
        wrong(
            "tokenizer-not-saved-with-model",
            "the written tokenizer gives other ids than the one in training",
            "set model.tokenizer to the tokenizer as transformers saves it (save_pretrained), and check again",
            (f"training: {request['probe_ids'][:12]}", f"written: {_written_ids(found)[:12]}"),
        )
    what = "scores" if request["kind"] == "reward" else "logits"
    return Seen(f"{found['tensors']:,} tensors equal, {what} {found['difference']} apart", problems,
                {"difference": found["difference"]})  # fmt: skip


def _written_ids(found: Mapping[str, Any]) -> list[int]:
    """What the written tokenizer makes of the probe text: as transformers reads it where it answers prompts."""
    return found.get("generation", found)["probe_ids"]


def generated(folder: Path, answer: Mapping[str, Any]) -> Seen:
    """An answer by the written tokenizer, template and weights: the same prompt as in training, within its budget."""
    found = answer.get("reload", {}).get("generation")
    if found is None:
        return Seen("not tried: the written model could not be read")
    request = read_json(folder / "request.json")
    problems: list[tuple[str, Finding]] = []
    if found["prompt"] != request["prompt"]:
        finding = Finding(
            what="the chat template that was written renders another prompt than training does",
            where="data.template",
            to_do="set data.template: tokenizer, or report the template",
            evidence=(f"training: {request['prompt'][:16]}", f"written: {found['prompt'][:16]}"),
        )
        problems.append(("training-inference-prompt-mismatch", finding))
    detail = f"{found['tokens']} tokens ({found['finish']}): {found['text'][:60]!r}"
    return Seen(detail, problems, {"tokens": found["tokens"], "finish": found["finish"]})


def resumed(folder: Path, answer: Mapping[str, Any]) -> Seen:
    """The checkpoint, put back by a new process, goes on where it was."""
    found = answer.get("resume", {"problem": "the new process did not come that far", "to_do": "see the step before"})
    if "problem" in found:
        finding = Finding(f"the checkpoint cannot be resumed: {found['problem']}", "the checkpoint", found["to_do"])
        return Seen(found["problem"], [("lora-resume-weights-not-loaded", finding)])
    request = read_json(folder / "request.json")
    if request["kind"] == "policy":
        return _resumed_policy(request, found)
    before, after = float(request["after"]), float(found["loss"])
    detail = f"loss {after:.5f} after resuming, {before:.5f} before"
    if abs(before - after) <= 10 * SUM_BOUNDS[request["precision"]] * max(1.0, abs(before)):
        return Seen(detail, figures={"before": before, "after": after})
    finding = Finding(
        what=f"after resuming the same batch has a loss of {after:.5g}, and had {before:.5g}",
        where="the checkpoint",
        to_do="report it: a resumed run would not go on where it stopped",
    )
    return Seen(detail, [("lora-resume-weights-not-loaded", finding)])


def _resumed_policy(request: Mapping[str, Any], found: Mapping[str, Any]) -> Seen:
    differing = [name for name, value in request["roles"].items() if found["sums"].get(name) != value]
    detail = f"{len(request['roles']):,} tensors of policy and critic are as they were, {found['answers']} answers on"
    if not differing and found["answers"] == request["answers"]:
        return Seen(detail, figures={"answers": found["answers"]})
    finding = Finding(
        what=f"after resuming {len(differing)} tensors of policy or critic are others, and {found['answers']} of "
        f"{request['answers']} answers are counted",
        where="the checkpoint",
        to_do="report it: a resumed run would not go on where it stopped",
        evidence=tuple(differing[:8]),
    )
    return Seen(finding.what, [("lora-resume-weights-not-loaded", finding)])


def run_fresh(folder: Path) -> dict[str, Any]:
    """The answers of a new Python process that knows only the folder. Raises UserError when it dies."""
    command = [sys.executable, "-m", "zhibei.doctor.fresh", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FRESH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"reading back did not end within {FRESH_SECONDS} s",
            expected="a disk that gives back what was written on it",
            fix="look at the disk (zhibei doctor), or put runs: on a faster one",
            where="runs",
        ) from None
    if not (folder / "answer.json").is_file():
        last = "; ".join(done.stderr.strip().splitlines()[-3:])
        raise UserError(
            f"the process that reads back died (exit code {done.returncode}): {last}",
            expected="a model that a new process can load",
            fix="look at memory (host and GPU) with zhibei doctor; zhibei explain names the cause of the message",
            where="rehearsal",
        )
    return read_json(folder / "answer.json")

"""The second half of a rehearsal, in a process of its own: what was saved is read back by someone who knows nothing.

`python -m zhibei.doctor.fresh FOLDER` reads FOLDER/request.json and writes FOLDER/answer.json. Knows what a rehearsal
left in the folder, not the model that wrote it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.store.checkpoint import check_checkpoint
from zhibei.store.files import read_json, write_json_atomic

ANSWER_TOKENS = 32


def main(folder: Path) -> int:
    """Every part by itself, so that one failure does not hide the others."""
    request = read_json(folder / "request.json")
    answer: dict[str, Any] = {}
    for name, part in PARTS.items():
        try:
            answer[name] = part(folder, request)
        except UserError as error:
            answer[name] = {"problem": str(error.what), "to_do": error.fix}
        except Exception as error:
            answer[name] = {"problem": f"{type(error).__name__}: {error}", "to_do": "report it with this message"}
    write_json_atomic(folder / "answer.json", answer)
    return 0


def reload(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The written model: the same tensors, finite, the same logits; its tokenizer gives the same ids."""
    import torch

    from zhibei.doctor.saving import outputs_of
    from zhibei.model.load import load_for_inference
    from zhibei.model.score_model import load_score_model_for_inference
    from zhibei.text.tokenizer import load_tokenizer
    from zhibei.train.step import checksums

    written = folder / "model"
    where = {name: request[name] for name in ("device", "precision", "base", "quantize")}
    is_scorer = request["kind"] == "reward"
    model = (load_score_model_for_inference if is_scorer else load_for_inference)(str(written), **where)
    expected = request["checksums"]
    theirs = {name: p for name, p in model.hf.named_parameters() if name in expected}
    sums = dict(zip(theirs, checksums(theirs).tolist(), strict=True)) if theirs else {}
    differing = [name for name, value in expected.items() if sums.get(name) != value]
    logits = outputs_of(model, request["probe_tokens"])
    before = np.load(folder / "logits.npy", allow_pickle=False)
    tokenizer = load_tokenizer(str(written))
    return {
        "tensors": len(expected),
        "differing": differing[:8],
        "num_differing": len(differing),
        "non_finite": [name for name, p in model.hf.named_parameters() if not bool(torch.isfinite(p).all())][:8],
        "difference": float(np.abs(logits - before).max()) if logits.shape == before.shape else None,
        "scale": float(np.abs(before).max()),
        "tokenizer": tokenizer.fingerprint,
        "probe_ids": tokenizer.encode(request["probe_text"]),
        **({} if is_scorer else {"generation": _generate(model, tokenizer, written, request)}),
    }


def _generate(model: Any, tokenizer: Any, written: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """An answer from nothing but the written folder: its chat template, its tokenizer, its weights."""
    from zhibei.generate.options import SamplingOptions
    from zhibei.generate.sampler import generate
    from zhibei.text.tokenizer import load_hugging_face_tokenizer

    exported = load_hugging_face_tokenizer(str(written))
    text = exported.apply_chat_template(request["messages"], add_generation_prompt=True, tokenize=False)
    prompt = exported(text, add_special_tokens=False)["input_ids"]
    answer = generate(
        model.hf,
        [prompt],
        options=SamplingOptions(max_new_tokens=ANSWER_TOKENS, temperature=0.0, overflow="fewer_tokens"),
        stop_ids=request["stop_ids"],
        pad_id=tokenizer.pad_id,
        decode=tokenizer.decode,
    )[0]
    return {
        "prompt": prompt,
        "tokens": len(answer.tokens),
        "text": exported.decode(answer.content_tokens, skip_special_tokens=True),
        "finish": answer.finish,
        "probe_ids": exported(request["probe_text"], add_special_tokens=False)["input_ids"],
    }


def resume(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The run as it would be resumed: the checkpoint is sound, and goes on where it was."""
    from zhibei.store.checkpoint import list_steps

    step, path = list_steps(folder / "checkpoints")[-1]
    problems = [str(problem) for problem in check_checkpoint(path, step=step)]
    if problems:
        return {"problem": "; ".join(problems), "to_do": "look at the disk (zhibei doctor)"}
    return (_resume_policy if request["kind"] == "policy" else _resume_rows)(folder, path, step)


def _resume_rows(folder: Path, path: Path, step: int) -> dict[str, Any]:
    """The next step has the loss it had before."""
    from zhibei.doctor.hard_items import hardest
    from zhibei.store.run_dir import RunDir
    from zhibei.train.materials import gather
    from zhibei.train.resume import restore

    materials, worst = hardest(gather(read_run(str(folder / "resolved.yaml"))), RunDir(folder), step=step)
    restore(path, materials.stepper, key=materials.rows.key)
    passes = materials.task.before_step(materials.model, worst.first)
    record = materials.stepper.step(passes, learning_rate=0.0)
    return {"loss": record.loss, "step": step}


def _resume_policy(folder: Path, path: Path, step: int) -> dict[str, Any]:
    """Policy and critic are bit for bit what they were, and how far the run is."""
    from zhibei.doctor.policy_rehearsal import role_sums
    from zhibei.train.policy_materials import gather_policy
    from zhibei.train.policy_state import restore_rest
    from zhibei.train.resume import restore

    parts = gather_policy(read_run(str(folder / "resolved.yaml")))
    restore(path, parts.materials.stepper, key=parts.materials.rows.key)
    state = restore_rest(path, parts)
    return {"sums": role_sums(parts), "answers": state.answers, "step": step}


PARTS: dict[str, Callable[[Path, Mapping[str, Any]], dict[str, Any]]] = {"reload": reload, "resume": resume}

if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except BaseException as fault:
        print(json.dumps({"died": f"{type(fault).__name__}: {fault}"}), file=sys.stderr)
        raise

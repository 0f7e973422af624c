"""What the audit says about ALL rows: counted facts as plain JSON, and as text for a person. Knows no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.data.encode import Chunk, Wording
from zhibei.data.remedies import remedy_of

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
LONGEST_SHOWN = 10
MERGE_NOTICE_SHARE = 0.02


def audit_rows(
    chunk: Chunk,
    *,
    is_heldout: np.ndarray,
    broken: Sequence[dict[str, Any]],
    wording: Wording,
    sources: Sequence[str],
) -> dict[str, Any]:
    """Counts over every row that was read; `broken` are the ledger entries of records the readers refused."""
    facts, lengths = chunk.facts, chunk.lengths
    ledger = [*broken, *chunk.ledger]
    reasons = {
        action: Counter(e["reason"] for e in ledger if e["action"] == action) for action in ("dropped", "changed")
    }
    num_tokens = int(lengths.sum())
    first = facts["continues"] == 0
    bos = facts["bos"][first]
    terminators = int(facts["terminators"].sum())
    audit = {
        "template": wording.template.name,
        "terminator": wording.template.terminator,
        "rows_read": chunk.num_read + len(broken),
        "rows_kept": len(lengths),
        "rows_train": int((~is_heldout).sum()),
        "rows_heldout": int(is_heldout.sum()),
        "dropped": dict(sorted(reasons["dropped"].items())),
        "changed": dict(sorted(reasons["changed"].items())),
        "rows_cut": reasons["changed"].get("too_long", 0),
        "rows_without_supervision": reasons["dropped"].get("nothing_learned", 0),
        "tokens": num_tokens,
        "tokens_supervised": int(facts["supervised"].sum()),
        "supervised_share": _share(int(facts["supervised"].sum()), num_tokens),
        "answers": int(facts["answers"].sum()),
        "terminators": terminators,
        "terminators_supervised": int(facts["terminators_supervised"].sum()),
        "terminators_supervised_share": _share(int(facts["terminators_supervised"].sum()), terminators),
        "bos_per_row": {"min": int(bos.min()) if len(bos) else 0, "max": int(bos.max(initial=0))},
        "unknown_tokens": int(facts["unk"].sum()),
        "rows_with_border_merges": int((facts["border_merges"] > 0).sum()),
        "border_merges": int(facts["border_merges"].sum()),
        "prompts_compared": dict(chunk.prompts),
        "rows_with_special_tokens_in_text": int(facts["special"].sum()) + reasons["dropped"].get("special_token", 0),
        "lengths": _lengths(lengths),
        "longest_rows": [
            {"row": chunk.row_ids[place], "tokens": int(lengths[place])}
            for place in np.argsort(-lengths, kind="stable")[:LONGEST_SHOWN]
        ],
        "sources": _per_source(chunk, is_heldout=is_heldout, sources=sources),
        "duplicates": _duplicates(chunk.hashes, is_heldout),
        "tokenizer": {
            "source": wording.tokenizer.source,
            "ids": len(wording.tokenizer),
            "bos": wording.tokenizer.bos,
            "eos": wording.tokenizer.eos,
            "pad": wording.tokenizer.pad,
            "unk": wording.tokenizer.unk,
        },
    }
    audit["notices"] = _notices(audit, wording)
    return audit


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Tokens per row: percentiles, and a histogram whose bins double."""
    if not len(lengths):
        return {"mean": 0.0, "percentiles": {}, "histogram": []}
    top = int(lengths.max())
    edges = [0, *(2**power for power in range(4, max(5, top.bit_length() + 1)))]
    counts, _ = np.histogram(lengths, bins=edges)
    return {
        "mean": float(lengths.mean()),
        "percentiles": {str(p): int(np.percentile(lengths, p, method="nearest")) for p in PERCENTILES},
        "histogram": [
            {"from": left, "below": right, "rows": int(count)}
            for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
    }


def _per_source(chunk: Chunk, *, is_heldout: np.ndarray, sources: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for number, path in enumerate(sources):
        mine = chunk.facts["source"] == number
        found.append(
            {
                "source": path,
                "rows": int(mine.sum()),
                "rows_heldout": int((mine & is_heldout).sum()),
                "tokens": int(chunk.lengths[mine].sum()),
                "tokens_supervised": int(chunk.facts["supervised"][mine].sum()),
            }
        )
    return found


def _duplicates(hashes: Sequence[str], is_heldout: np.ndarray) -> dict[str, int]:
    train = {digest for digest, held in zip(hashes, is_heldout, strict=True) if not held}
    held = {digest for digest, held in zip(hashes, is_heldout, strict=True) if held}
    return {"rows_said_before": len(hashes) - len(train | held), "across_train_and_heldout": len(train & held)}


def _notices(audit: dict[str, Any], wording: Wording) -> list[str]:
    """What a person should know before training, in words."""
    notices = list(wording.tokenizer.notes)
    terminator = wording.template.terminator.strip()
    pieces = wording.tokenizer.encode(terminator)
    if terminator.startswith("<") and len(pieces) > 1:
        notices.append(
            f"{terminator} is no token of this tokenizer but {len(pieces)} pieces; the model learns to spell it. "
            "A template that ends turns with the EOS token (alpaca, vicuna) is surer"
        )
    merged = audit["rows_with_border_merges"]
    if merged > MERGE_NOTICE_SHARE * max(1, audit["rows_kept"]):
        notices.append(
            f"in {merged} rows ({merged / audit['rows_kept']:.1%}) one token holds the end of the prompt and the "
            "beginning of the answer, so the model will be prompted with other ids than it was trained on; a template "
            "whose prompt ends in a newline or a control token avoids this (alpaca_lora instead of alpaca)"
        )
    if audit["prompts_compared"].get("different"):
        notices.append(
            f"{audit['prompts_compared']['different']} of {sum(audit['prompts_compared'].values())} compared prompts "
            "have other ids when chatting than in training: the template writes earlier turns differently later"
        )
    if audit["unknown_tokens"]:
        notices.append(f"{audit['unknown_tokens']} tokens are {wording.tokenizer.unk}: characters the tokenizer lacks")
    if getattr(wording.template, "names_a_date", False):
        notices.append("the chat template writes today's date into every row; tomorrow's rows will differ")
    return notices


def require_trainable(audit: dict[str, Any], ledger: Sequence[dict[str, Any]]) -> None:
    """Raises UserError when training on these rows could only waste time."""
    if not audit["rows_train"]:
        example = next((entry for entry in ledger if entry["action"] == "dropped"), None)
        seen = f"; e.g. {example['where']}: {example['detail']}" if example else ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in audit["dropped"].items()) or "none dropped"
        raise UserError(
            f"no row is left to train on: {audit['rows_read']} read, {audit['rows_heldout']} held out, {reasons}{seen}",
            expected="at least one row with learned tokens",
            fix=remedy_of(audit["dropped"]),
            where="data.validation" if "in_validation" in audit["dropped"] else "data",
            pitfall="dataset-all-rows-dropped",
        )
    if audit["terminators"] and not audit["terminators_supervised"]:
        raise UserError(
            "not one answer keeps its terminator, so the model could never learn to stop",
            expected="answers that fit into data.max_tokens",
            fix="raise data.max_tokens, or set data.too_long: drop",
            where="data.max_tokens",
            pitfall="cutoff-drops-eos",
        )


def format_audit(audit: dict[str, Any]) -> str:
    """The audit as lines of text, for a terminal or a log, before training starts."""
    lines = _counted(audit)
    if "sides" in audit:
        return "\n".join([*lines, *_of_sides(audit), *(f"note        {notice}" for notice in audit["notices"])])
    lengths = audit["lengths"]
    bos = audit["bos_per_row"]
    lines += [
        f"tokens      {audit['tokens']:,}, of which {audit['supervised_share']:.1%} are learned",
        f"answers     {audit['answers']:,}; {audit['terminators_supervised_share']:.2%} keep and learn "
        f"their terminator {audit['terminator']!r}",
        f"BOS         {bos['min']} to {bos['max']} per row",
    ]
    compared = sum(audit["prompts_compared"].values())
    if compared:
        equal = audit["prompts_compared"]["equal"]
        lines.append(f"prompts     {equal:,} of {compared:,} compared have the same ids in training and in chatting")
    if lengths["percentiles"]:
        p = lengths["percentiles"]
        lines.append(
            f"length      {p['0']} to {p['100']} tokens, mean {lengths['mean']:.0f}, median {p['50']}, "
            f"95% up to {p['95']}, 99% up to {p['99']}"
        )
        lines += _bars(lengths["histogram"])
    if len(audit["sources"]) > 1:
        lines += [
            f"source      {one['source']}: {one['rows']:,} rows, {one['tokens']:,} tokens" for one in audit["sources"]
        ]
    lines += [f"note        {notice}" for notice in audit["notices"]]
    return "\n".join(lines)


def _counted(audit: dict[str, Any]) -> list[str]:
    """What was read, kept, dropped and changed."""
    lines = [
        f"{audit.get('kind', 'rows'):<12}{audit['rows_read']:,} read, {audit['rows_kept']:,} kept "
        f"({audit['rows_train']:,} to train on, {audit['rows_heldout']:,} held out)",
    ]
    for action in ("dropped", "changed"):
        if audit[action]:
            reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in audit[action].items())
            lines.append(f"{action:<12}{reasons} (see the ledger)")
    return lines


def _of_sides(audit: dict[str, Any]) -> list[str]:
    """Pairs, judged answers and prompts: each side's tokens, and how the sides compare."""
    lines = [
        f"{name:<12}{side['tokens']:,} tokens, {side['mean_answer_tokens']:.0f} per answer on average; "
        f"{side['terminated']:,} answers keep their terminator {audit['terminator']!r}"
        for name, side in audit["sides"].items()
    ]
    if "rejected_longer_share" in audit:
        lines.append(f"length      the rejected answer is the longer one in {audit['rejected_longer_share']:.1%}")
    if "good" in audit:
        lines.append(f"labels      {audit['good']:,} good, {audit['bad']:,} bad")
    return lines


def _bars(histogram: Sequence[dict[str, int]]) -> list[str]:
    """One line per bin between the first and the last that hold rows."""
    filled = [place for place, one in enumerate(histogram) if one["rows"]]
    shown = histogram[filled[0] : filled[-1] + 1] if filled else []
    most = max((one["rows"] for one in shown), default=1)
    return [
        f"{one['from']:>18} - {one['below'] - 1:<6} {'█' * round(30 * one['rows'] / most):<30} {one['rows']:,}"
        for one in shown
    ]

"""What other trainers get wrong about labels and cannot go wrong here: each promise of the catalogue, on real rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.text.small_tokenizers import byte_level
from zhibei.config.run import DataSection, ModelSection, RunFile
from zhibei.data.batches import NOT_LEARNED, Batches, BatchPlan
from zhibei.data.prepare import prepare
from zhibei.data.prepared import PreparedRows, PreparedSet
from zhibei.text.families import find_template
from zhibei.text.tokenizer import Tokenizer, check_tokenizer

ROWS = [{"instruction": f"Count to {n}.", "output": " ".join(str(one) for one in range(n + 1))} for n in range(1, 25)]


def rows_of(folder: Path, tokenizer: Tokenizer, **data: Any) -> PreparedSet:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    section = DataSection(sources=[str(path)], template="alpaca_lora", workers=0, validation=2, **data)
    run = RunFile(name="t", model=ModelSection(path="m"), data=section)
    return prepare(run, tokenizer, find_template("alpaca_lora", tokenizer), use_cache=False)


def by_row(rows: PreparedRows) -> dict[str, list[int]]:
    parts = np.split(rows.tokens, rows.borders[1:-1])
    return {row: part.tolist() for row, part in zip(rows.row_ids, parts, strict=True)}


def test_a_cut_row_is_the_beginning_of_the_whole_row(tmp_path: Path) -> None:
    whole = rows_of(tmp_path, byte_level())
    limit = int(np.median(whole.train.lengths))
    cut = rows_of(tmp_path, byte_level(), max_tokens=limit, too_long="cut")
    assert 0 < cut.audit["rows_cut"] < len(ROWS)
    kept = by_row(cut.train)
    assert len(kept) > 5
    for row, tokens in by_row(whole.train).items():
        assert row not in kept or kept[row] == tokens[:limit]


def test_the_terminator_is_learned_although_it_pads(tmp_path: Path) -> None:
    """Padding by the id of EOS, side by side: every answer still has its own EOS among the targets."""
    tokenizer = byte_level()
    rows = rows_of(tmp_path, tokenizer).train
    eos = tokenizer.eos_id
    plan = BatchPlan(global_batch=8, micro_batch_tokens=4096, packing=False, pad_multiple=32, pad_token=eos)
    for batch in Batches(rows, plan).micro_batches(0):
        tokens, targets = batch.tokens_BT.numpy(), batch.targets_BT.numpy()
        assert (tokens == eos).sum() > len(tokens)  # there is padding, with that id
        assert ((targets == eos).sum(axis=1) == 1).all()
        assert (targets[tokens == eos] == NOT_LEARNED).all()


def test_a_tokenizer_that_adds_eos_shifts_no_mask(tmp_path: Path) -> None:
    """Its post-processor appends EOS to every text; rows and masks are those of the plain tokenizer all the same."""
    plain = byte_level()
    backend = plain.backend.from_str(plain.spec)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", plain.eos_id)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    adding = check_tokenizer(wrapped, source="adds eos")
    assert adding.backend.encode("a").ids[-1] == plain.eos_id != plain.backend.encode("a").ids[-1]
    mine, theirs = rows_of(tmp_path, adding), rows_of(tmp_path, plain)
    assert np.array_equal(mine.train.tokens, theirs.train.tokens)
    assert np.array_equal(mine.train.supervised, theirs.train.supervised)
    first = mine.train.tokens[: mine.train.borders[1]][mine.train.supervised[: mine.train.borders[1]]]
    number = int(mine.train.row_ids[0].split("#")[1])
    assert plain.decode(first.tolist()) == ROWS[number]["output"] + "</s>"

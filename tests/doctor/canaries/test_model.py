"""Canaries of the model's own files."""

from __future__ import annotations

from pathlib import Path

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import broken, healthy

FINE = healthy()
HUB_ID_NOT_HERE = broken(broken(broken(FINE, "model.folder", None), "model.tensors", {}), "model.embedding_rows", None)
NOTHING = broken(FINE, "model.tensors", {})
NORM = "model.layers.3.input_layernorm.weight"

CANARIES: Canaries = {
    "weights-not-finite": (
        [
            broken(FINE, "model.non_finite", ("model.embed_tokens.weight",)),
            broken(FINE, "model.non_finite", tuple(f"model.layers.{n}.mlp.up_proj.weight" for n in range(32))),
            broken(FINE, "model.non_finite", (NORM,)),
        ],
        [FINE, HUB_ID_NOT_HERE],
    ),
    "weights-incomplete": (
        [
            broken(FINE, "model.weight_faults", ("/m/model.safetensors: truncated to 1,000 of 2,000 bytes",)),
            broken(FINE, "model.missing_files", ("model-00002-of-00003.safetensors",)),
            broken(NOTHING, "model.pickled_files", ("pytorch_model.bin",)),
            NOTHING,
        ],
        [FINE, HUB_ID_NOT_HERE, broken(FINE, "model.pickled_files", ("pytorch_model.bin",))],
    ),
    "weights-do-not-fit-config": (
        [broken(FINE, "model.shape_faults", ("num_hidden_layers is 32, layers missing: [31], too many: []",))],
        [FINE, HUB_ID_NOT_HERE],
    ),
    "weights-all-zero": (
        [
            broken(FINE, "model.zero_tensors", ("lm_head.weight",)),
            broken(FINE, "model.zero_tensors", ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")),
        ],
        [FINE, HUB_ID_NOT_HERE],
    ),
    "weights-far-too-large": (
        [
            broken(FINE, "model.wild_tensors", {"lm_head.weight": 3.4e38}),
            broken(FINE, "model.wild_tensors", {NORM: 2e4, "lm_head.weight": 6e4}),
        ],
        [FINE, HUB_ID_NOT_HERE],
    ),
}


def test_a_missing_file_is_told_once() -> None:
    from zhibei.doctor.pitfalls.model import weights_incomplete

    fault = "/m/model.safetensors.index.json: names model-00002-of-00003.safetensors, which is missing (9 tensors)"
    facts = broken(FINE, "model.weight_faults", (fault,))
    facts = broken(facts, "model.missing_files", ("model-00002-of-00003.safetensors",))
    (finding,) = weights_incomplete(facts)
    assert finding.where == str(Path("/m/model.safetensors.index.json"))

"""What other tools call the ways of dividing a model: understood, and said."""

import pytest

from zhibei.config.distributed import OLD_NAMES
from zhibei.config.errors import UserError
from zhibei.config.read import read_run

NEEDED = ["model.path=model", "data.sources=[rows.json]"]


@pytest.mark.parametrize("name", sorted(OLD_NAMES))
def test_an_old_name_is_translated_with_a_note_and_an_origin(name):
    resolved = read_run("alpaca-7b", [*NEEDED, f"distributed.sharding={name}"])
    sharding, offload = OLD_NAMES[name]
    assert resolved.run.distributed.sharding == sharding
    assert resolved.run.distributed.offload == (offload or "none")
    [note] = [note for note in resolved.notes if "distributed.sharding" in note]
    assert note.startswith(f"distributed.sharding: {name} (command line) is called {sharding} here")
    assert resolved.origins["distributed.sharding"] == f"command line, where it is called {name}"


def test_a_name_of_ours_needs_no_note():
    resolved = read_run("alpaca-7b", [*NEEDED, "distributed.sharding=full_shard"])
    assert not [note for note in resolved.notes if "sharding" in note]
    assert resolved.origins["distributed.sharding"] == "command line"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("sft.fsdp_transformer_layer_cls_to_wrap=LLaMADecoderLayer", "layers to wrap are found in the model"),
        ("sft.fsdp=full_shard auto_wrap", "distributed.sharding: full_shard"),
        ("sft.ddp_timeout=1800", "distributed.patience_seconds"),
        ("distributed.nproc_per_node=4", "--gpus-per-node"),
        ("distributed.sharding=fully_shard", "full_shard"),
    ],
)
def test_a_key_that_is_not_ours_is_refused_with_the_right_one(setting, said):
    with pytest.raises(UserError) as caught:
        read_run("alpaca-7b", [*NEEDED, setting])
    assert said in str(caught.value)

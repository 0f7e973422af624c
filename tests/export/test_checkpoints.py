"""A checkpoint, in parts or whole, becomes the folder that the finished run would have been; without the memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_model_folder
from tests.train.small_run import small_run
from zhibei.cli.app import run_command
from zhibei.config.errors import UserError
from zhibei.export.checkpoints import export_checkpoint
from zhibei.model.load import load_for_inference
from zhibei.store.checkpoint import Draft, load_checkpoint
from zhibei.store.checkpoint_files import write_share
from zhibei.store.folders import remove_folder
from zhibei.store.parts import Part, StoredTensors
from zhibei.store.verify import inspect_folder
from zhibei.train.offline import train

SETTINGS = ["sft.max_steps=3", "sft.sample_tokens=0", "sft.keep_best=false", "sft.warmup_steps=0"]


def in_parts(stored: StoredTensors, rank: int, world: int) -> dict[str, torch.Tensor | Part]:
    """A rank's share, as FSDP divides tensors: rows in equal chunks, the last ranks with fewer or none."""
    found: dict[str, torch.Tensor | Part] = {}
    for name in stored:
        value = stored[name]
        chunk = -(-value.shape[0] // world) if value.ndim else 0
        start, stop = rank * chunk, min((rank + 1) * chunk, len(value) if value.ndim else 0)
        if start < stop:
            found[name] = Part(value[start:stop].clone(), start, len(value))
        elif not value.ndim and rank == 0:
            found[name] = value
    return found


def rewrite_in_parts(path: Path, world: int) -> None:
    """The same checkpoint as `world` ranks would have written it."""
    groups, state = load_checkpoint(path)
    shares = [{group: in_parts(stored, rank, world) for group, stored in groups.items()} for rank in range(world)]
    step = state.pop("step")
    remove_folder(path)
    draft = Draft(path.parent, step, groups=list(groups), state=state, needed_bytes=0, world=world)
    lines = []
    for rank, share in enumerate(shares):
        lines += write_share(draft.folder, share, purpose=draft.purpose, rank=rank, world=world)
    draft.commit(lines)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_last_checkpoint_in_parts_is_the_finished_model(method: str, tmp_path: Path) -> None:
    run_dir = train(small_run(tmp_path, *SETTINGS, f"model.method={method}"))
    rewrite_in_parts(run_dir.checkpoint(3), 3)
    assert inspect_folder(run_dir.checkpoint(3)).is_sound
    assert inspect_folder(run_dir.path).is_sound
    made = export_checkpoint(str(run_dir.path), "newest")
    assert made.path == run_dir.exports / "hf-step-000003"
    assert inspect_folder(made.path).kind == "model"
    ours: torch.nn.Module = AutoModelForCausalLM.from_pretrained(made.path)
    tokens = torch.tensor([[5, 9, 17, 30]])
    finished = load_for_inference(str(run_dir.path))
    with torch.no_grad():
        difference = (ours(tokens).logits - finished.hf(tokens).logits).abs().max()
    if method == "full":
        assert difference == 0
        theirs = dict(finished.hf.named_parameters())
        assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.named_parameters())
        written, model = (AutoTokenizer.from_pretrained(folder) for folder in (made.path, run_dir.model))
        assert written.chat_template == model.chat_template
        assert (made.path / "generation_config.json").read_text() == (
            run_dir.model / "generation_config.json"
        ).read_text()
    assert difference < 1e-4


def test_what_cannot_be_exported_is_named(tmp_path: Path, capsys) -> None:
    run_dir = train(small_run(tmp_path, *SETTINGS))
    for asked in ("7", "step-000007", "last", "../step-000003"):
        with pytest.raises(UserError, match=f"has no checkpoint {asked}") as caught:
            export_checkpoint(str(run_dir.path), asked)
        assert "step-000003" in caught.value.expected
    assert run_command(["export", str(run_dir.path), "--to", "meta", "--checkpoint", "3"]) == 2
    assert "--checkpoint with --to hf" in " ".join(capsys.readouterr().err.split())
    file = run_dir.checkpoint(3) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match="step-000003 is not sound: hash differs"):
        export_checkpoint(str(run_dir.path), "3")
    assert not run_dir.exports.exists()


MEASURED = """
import json, resource, sys
import torch, transformers.models.llama.modeling_llama, peft
from zhibei.export.checkpoints import export_checkpoint
torch.set_num_threads(1)
export_checkpoint(sys.argv[1], "newest")
before = int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
open("/proc/self/clear_refs", "w").write("5")
export_checkpoint(sys.argv[2], "newest")
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
print(json.dumps({"rise_mib": (peak - before) / 1024}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_the_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    """The peak rises by a few of the largest tensor. A first, small export pays for what is loaded anyway."""
    small = train(small_run(tmp_path, *SETTINGS))
    wide = tiny_model_folder(tmp_path, name="wide")
    config = AutoConfig.from_pretrained(wide)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 2048, 24
    config.head_dim = 256 // config.num_attention_heads
    AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    run_dir = train(small_run(tmp_path, *SETTINGS, "name=wide", f"model.path={wide}", "sft.max_steps=1"))
    rewrite_in_parts(run_dir.checkpoint(1), 2)
    stored = load_checkpoint(run_dir.checkpoint(1))[0]["model"]
    sizes = [stored[name].nbytes / 2**20 for name in stored]
    command = [sys.executable, "-c", MEASURED, str(small.path), str(run_dir.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rise_mib = json.loads(done.stdout.splitlines()[-1])["rise_mib"]
    # What the allocator of the C library keeps varies by some MiB.
    assert sum(sizes) > 60 * max(sizes)
    assert rise_mib < 8 * max(sizes) + 24
    assert rise_mib < 0.4 * sum(sizes)


def test_at_the_command_line(tmp_path: Path) -> None:
    run_dir, new = train(small_run(tmp_path, *SETTINGS)), tmp_path / "new"
    assert run_command(["export", str(run_dir.path), "--to", "hf", "--checkpoint", "3", "--out", str(new)]) == 0
    assert json.loads((new / "made_from.json").read_text())["step"] == 3

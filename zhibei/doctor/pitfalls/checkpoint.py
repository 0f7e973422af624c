"""Pits of saving: disks that fill, saves that fail or leave something out. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.plan.disk import DiskPlan

GIB = 2.0**30
FILES_PER_CHECKPOINT = 8


def planned_disk(facts: Facts) -> DiskPlan | None:
    """What the run will write; None where the model's sizes are not known."""
    return facts.plan.disk if facts.plan is not None else None


def free_bytes(facts: Facts) -> tuple[int, str] | None:
    """(bytes, where the limit comes from)."""
    if facts.machine.is_described:
        described = facts.machine.disk_free_gib
        return None if described is None else (int(described * GIB), f"the disk of {facts.machine.name}")
    output = facts.output
    if output is None or output.free_bytes is None or not output.is_writable:
        return None
    if output.quota_free_bytes is not None and output.quota_free_bytes < output.free_bytes:
        return output.quota_free_bytes, f"the quota on {output.place}"
    return output.free_bytes, f"the disk of {output.place} ({output.file_system or 'file system unknown'})"


def size(num_bytes: float) -> str:
    """`13.5 GiB`, `1.4 MiB`, `96 KiB`: small models have small checkpoints."""
    units = ((2**30, "GiB", 1), (2**20, "MiB", 1), (2**10, "KiB", 0))
    factor, unit, digits = next((one for one in units if num_bytes >= one[0] * 0.1), units[-1])
    return f"{num_bytes / factor:,.{digits}f} {unit}"


@pitfall(
    "checkpoint",
    cost="run",
    errors=[
        r"\[Errno 28\] No space left on device",
        r"PytorchStreamWriter failed writing file",
        r"file write failed",
        r"\[Errno 122\] Disk quota exceeded",
        r"unexpected pos \d+ vs \d+",
        r"iostream error",
    ],
    sources=[
        "https://github.com/databrickslabs/dolly/issues/139",
        "https://github.com/hiyouga/LlamaFactory/issues/1223",
        "https://github.com/h2oai/h2o-llmstudio/issues/214",
        "https://github.com/Sachini/ronin/issues/51",
        "https://github.com/SWivid/F5-TTS/issues/458",
    ],
)
def disk_full_at_checkpoint(facts: Facts) -> Iterable[Finding]:
    """The disk has no room for the checkpoints this run will keep.

    Why: A checkpoint of full training is about six times the model: weights, fp32 masters and both moments. The new
    one must be complete before the oldest is deleted, so one more than keep_checkpoints lies there for a moment, and
    the best one besides. Most programs notice in the middle of a save, hours into the run.

    Fix: Put runs: on a larger disk, lower sft.keep_checkpoints, save more seldom, or train adapters.

    磁盘放不下这次训练要保留的检查点。

    为何：全参训练的一个检查点约为模型的六倍：权重、fp32 主权重和两个动量。必须先写完新的才能删最旧的，因此某一刻会比
    keep_checkpoints 多一份，另外还有最好的一份。多数程序要到保存中途、训练数小时之后才发现。

    办法：把 runs: 放到更大的磁盘上，减小 sft.keep_checkpoints，减少保存次数，或改训适配器。
    """
    disk, free = planned_disk(facts), free_bytes(facts)
    if disk is not None and free is not None and free[0] < disk.checkpoints_bytes:
        needed = f"{disk.saves.most} checkpoints of {size(disk.checkpoint_bytes)} each"
        keep = f"{facts.run.stage}.keep_checkpoints"
        yield Finding(
            what=f"{needed} need {size(disk.checkpoints_bytes)}, and {size(free[0])} are free",
            where=free[1],
            to_do=f"put runs: on a disk with {size(disk.written_bytes)} or more free, or lower {keep}",
            changes={keep: 1} if facts.run.training.keep_checkpoints > 1 else {},
            level="stop" if free[0] < 2 * disk.checkpoint_bytes else "warning",
        )
    output = facts.output
    if output is not None and output.free_inodes is not None and not facts.machine.is_described:
        files = FILES_PER_CHECKPOINT * 4 + 40
        if 0 < output.free_inodes < files:
            yield Finding(
                what=f"{output.free_inodes} more files can be made, and the run makes about {files}",
                where=f"the disk of {output.place}",
                to_do="delete small files there (caches, old runs), or put runs: elsewhere",
            )


@pitfall(
    "checkpoint",
    cost="run",
    sources=["https://github.com/axolotl-ai-cloud/axolotl/pull/3073"],
)
def final_consolidation_no_disk(facts: Facts) -> Iterable[Finding]:
    """The checkpoints fit on the disk, and the finished model beside them does not.

    Why: The last thing a run writes is the whole model, while all its checkpoints still lie there. Where weights are
    sharded, gathering them takes the same again.

    Fix: Put runs: on a larger disk, or lower sft.keep_checkpoints.

    检查点放得下，训练完成的模型却放不下了。

    为何：训练最后写出整个模型，此时所有检查点还在原处；若权重是分片的，合并还要再占一份。

    办法：把 runs: 放到更大的磁盘上，或减小 sft.keep_checkpoints。
    """
    disk, free = planned_disk(facts), free_bytes(facts)
    if disk is None or free is None or not disk.checkpoints_bytes <= free[0] < disk.finishing_bytes:
        return
    yield Finding(
        what=f"at the end {disk.saves.last} checkpoints of {size(disk.checkpoint_bytes)} each and the "
        f"model of {size(disk.model_bytes)} need {size(disk.finishing_bytes)}, and {size(free[0])} are free",
        where=free[1],
        to_do=f"put runs: on a disk with {size(disk.finishing_bytes)} or more free, or save fewer checkpoints",
    )


@pitfall(
    "checkpoint",
    cost="run",
    errors=[
        r"generation config instance is invalid|GenerationConfig is invalid",
        r"`do_sample` is set to `False`\. However, `(temperature|top_p|top_k|min_p|typical_p)` is set",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/29988",
        "https://github.com/haotian-liu/LLaVA/issues/1144",
        "https://github.com/hiyouga/LlamaFactory/issues/2767",
        "https://github.com/OpenRLHF/OpenRLHF/issues/212",
        "https://github.com/QwenLM/Qwen3-ASR/issues/210",
    ],
)
def generation_config_invalid_at_save(facts: Facts) -> Iterable[Finding]:
    """The base's generation_config.json contradicts itself, and transformers refuses to save it.

    Why: Older models ship a temperature or top_p with do_sample off. Loading them only warns; saving raises, and the
    first save of many programs comes after hours.

    Fix: Write do_sample: true into the base's generation_config.json, or remove the fields that only sampling uses.

    基座的 generation_config.json 自相矛盾，transformers 拒绝保存。

    为何：较早的模型带有 temperature 或 top_p，却没有开启 do_sample。加载时只有警告，保存时才报错，而许多程序第一次保存
    是在数小时之后。

    办法：在基座的 generation_config.json 中写 do_sample: true，或删去只有采样才用的字段。
    """
    model = facts.model
    if model is not None and model.generation_config_fault and facts.resolved is not None:
        is_written = facts.run.model.method == "full"
        yield Finding(
            what=f"generation_config.json: {model.generation_config_fault}",
            where=f"{model.folder or model.path}/generation_config.json",
            to_do="set do_sample: true in that file, or remove those fields",
            level="stop" if is_written else "warning",
        )


RESUMED_BITS = "tests/train/test_sft.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit"
SAVING = "tests/train/test_saving.py::"
STORE = "tests/store/test_checkpoint.py::"


@pitfall(
    "checkpoint",
    cost="run",
    kind="construction",
    because="saving has an interval of its own and does not depend on whether anything is evaluated",
    proof=[f"{SAVING}test_checkpoints_are_saved_where_nothing_is_evaluated"],
    errors=[r"load_best_model_at_end requires the save and eval(uation)? strategy to match"],
    sources=[
        "https://github.com/huggingface/transformers/issues/12685",
        "https://github.com/huggingface/transformers/pull/12687",
    ],
)
def best_model_flag_disables_saving() -> None:
    """Keeping the best model switches off saving, because nothing is evaluated.

    Why: In some versions of Trainer load_best_model_at_end silently replaces the saving interval by the evaluating one,
    and with evaluation off there is no checkpoint in the whole run.

    Fix: There: set an evaluation strategy. Here sft.save_every holds by itself.

    为了保留最好的模型而关掉了保存，因为没有做评估。

    为何：某些版本的 Trainer 中，load_best_model_at_end 会悄悄用评估间隔替换保存间隔；评估又关着，整个训练就没有检查点。

    办法：在那里要设评估策略；在 zhibei 中 sft.save_every 独立生效。
    """


@pitfall(
    "checkpoint",
    cost="run",
    kind="construction",
    because="an evaluation that is the best so far is saved at once, whatever the saving interval",
    proof=["tests/train/test_sft.py::test_the_best_evaluation_is_the_final_model"],
    errors=[r"could not locate the best model at", r"best_model_checkpoint (is|was) None"],
    sources=[
        "https://github.com/huggingface/transformers/pull/28500",
        "https://github.com/huggingface/transformers/pull/40221",
    ],
)
def best_model_not_loaded_silently() -> None:
    """The best model was asked for, and the last one is what was kept.

    Why: When the run is shorter than the saving interval, or the step counter is not updated, no best checkpoint
    exists, and Trainer keeps the last weights without a word.

    Fix: There: save at least as often as you evaluate. Here the manifest names the step the model was taken from.

    要求保留最好的模型，留下的却是最后一个。

    为何：训练比保存间隔还短，或步数计数没有更新时，并不存在最好的检查点，Trainer 便不声不响地保留最后的权重。

    办法：在那里要让保存至少与评估一样频繁；在 zhibei 中清单写明模型取自哪一步。
    """

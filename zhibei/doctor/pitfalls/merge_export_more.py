"""Pits of merging that cannot happen here, or that a loader or `zhibei merge` refuses."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall
from zhibei.doctor.pitfalls.checkpoint import SAVING

MERGING = "tests/export/test_merge.py::"


@pitfall(
    "merge_export",
    cost="hours",
    kind="construction",
    because="adapters are merged from whole files, and the logits are those of base and adapter",
    proof=[
        f"{SAVING}test_an_adapter_merged_at_load_gives_the_logits_of_base_and_adapter",
        f"{MERGING}test_merged_is_base_and_adapter_and_what_peft_merges",
    ],
    sources=[
        "https://github.com/meta-pytorch/torchtune/pull/506",
        "https://github.com/axolotl-ai-cloud/axolotl/issues/3294",
    ],
)
def fsdp_lora_merge_unsharded_only() -> None:
    """Merging inside of a sharded model gives wrong weights.

    Why: The two adapter matrices and the weight they belong to lie in different shards, and each hook sees pieces.

    Fix: Merge offline from consolidated files, and compare the logits.

    在分片的模型中合并会得到错误的权重。

    为何：适配器的两个矩阵与所属权重位于不同分片，钩子看到的都只是片段。

    办法：用合并好的完整文件离线合并，并比较 logits。
    """


@pitfall(
    "merge_export",
    cost="hours",
    kind="gate",
    proof=[f"{SAVING}test_a_folder_that_is_adapter_and_model_at_once_is_refused"],
    errors=[r"HFValidationError.{0,120}adapter"],
    sources=["https://github.com/axolotl-ai-cloud/axolotl/issues/1391"],
)
def lora_dir_mixed_with_merged() -> None:
    """One folder holds both an adapter and a whole model.

    Why: Tools disagree on what it is: one loads the model and ignores the adapter, another puts the adapter on a base
    that has it already.

    Fix: One folder for each. Here such a folder is refused, and a run writes either of them.

    同一个文件夹里既有适配器又有完整模型。

    为何：各工具理解不一：有的加载模型而忽略适配器，有的把适配器又加到已含它的基座上。

    办法：分开放。在 zhibei 中这样的文件夹会被拒绝，训练只写其中一种。
    """


@pitfall(
    "merge_export",
    cost="run",
    kind="construction",
    because="merging happens only into bases held in 16 or 32 bits; a quantised one is refused",
    proof=[
        f"{SAVING}test_nothing_is_merged_into_a_quantised_base",
        f"{MERGING}test_a_quantised_base_is_refused",
    ],
    errors=[r"merge lora module to (4|8)-bit linear may get different generations"],
    sources=[
        "https://github.com/huggingface/peft/issues/2321",
        "https://github.com/huggingface/transformers/issues/31293",
        "https://github.com/huggingface/peft/issues/1043",
    ],
)
def merge_into_4bit_degrades() -> None:
    """An adapter is merged into a 4-bit base, and most of what it learned is rounded away.

    Why: The sum is quantised again; the difference is smaller than a step of 4 bits.

    Fix: Load the base in 16 bits (on the CPU if need be), merge, and quantise once afterwards.

    适配器合并进 4 位基座，学到的大部分被舍入掉。

    为何：相加之后又量化一次，而差值小于 4 位的一个台阶。

    办法：以 16 位加载基座（必要时在 CPU 上），合并，然后只量化一次。
    """


@pitfall(
    "merge_export",
    cost="minutes",
    kind="construction",
    because="`zhibei merge` reads 16-bit files tensor by tensor and loads no model; a base stored quantised is refused",
    proof=[f"{MERGING}test_a_quantised_base_is_refused"],
    errors=[r"cannot merge lora layers when the model is loaded in (8|4)-bit"],
    sources=[
        "https://github.com/artidoro/qlora/issues/28",
        "https://github.com/artidoro/qlora/issues/16",
        "https://github.com/hiyouga/LlamaFactory/issues/1545",
    ],
)
def merge_into_8bit_error_old_peft() -> None:
    """An older PEFT refuses to merge into an 8-bit or 4-bit model.

    Why: It cannot write into quantised weights. People then comment the line out and export a model without its
    adapter.

    Fix: Load the base in 16 bits and merge there (`zhibei merge` needs no model in memory).

    较早的 PEFT 拒绝合并进 8 位或 4 位模型。

    为何：它无法写入量化权重。有人于是注释掉那一行，导出了没有适配器的模型。

    办法：以 16 位加载基座，在那里合并（`zhibei merge` 不需把模型装入内存）。
    """


@pitfall(
    "merge_export",
    cost="minutes",
    kind="construction",
    because="`zhibei export --to gguf` merges adapters in fp32 while it reads them and quantises the sum once",
    proof=["tests/export/test_gguf_files.py::test_an_adapter_is_merged_while_it_is_read"],
    errors=[r"please merge adapters before quantizing the model"],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/4175",
        "https://github.com/hiyouga/LlamaFactory/pull/4950",
    ],
)
def quantise_before_merge_order() -> None:
    """Merging and quantising are asked for in one step.

    Why: Quantising works on whole weights, and the adapter is not part of them yet.

    Fix: Two steps: merge into 16 bits, then quantise what was written.

    在同一步里要求合并又要求量化。

    为何：量化处理的是完整权重，而适配器还不在其中。

    办法：分两步：先合并成 16 位，再量化写出的结果。
    """

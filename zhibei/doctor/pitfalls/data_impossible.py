"""Pits of packing, caching and preparing rows that cannot happen here, with the tests that show it. Knows no rows."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall

PREPARED = "tests/data/test_prepare.py"


@pitfall(
    "data",
    cost="run",
    kind="construction",
    because="packed rows carry their borders into the attention kernel, and kernels that cannot keep rows apart are "
    "refused beside packing",
    proof=[
        "tests/parity/test_packing.py::test_packed_padded_single_and_transformers_agree",
        "tests/parity/test_packing.py::test_a_row_that_sees_its_neighbour_is_noticed",
        "tests/config/test_effects.py::test_rule_bites_and_lets_the_healthy_pass",
    ],
    errors=[
        r"packing .{0,120}(?:contaminat|attend to one another|without flash|requires flash|only.{0,20}flash)",
        r"cross[- ]contaminat",
    ],
    sources=[
        "https://github.com/huggingface/trl/pull/3526",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/3796",
        "https://github.com/hiyouga/LlamaFactory/pull/4224",
        "https://github.com/meta-pytorch/torchtune/pull/875",
    ],
)
def packing_cross_contamination() -> None:
    """Packed rows see one another.

    Why: Rows share a sequence to save padding; with an attention that does not know their borders, the second row is
    learned with the first as its context.

    Fix: Nothing to do here: logits of a row alone, padded and packed are equal in the tests.

    打包在一起的行互相看得见。

    为何：为省去填充，几行共用一个序列；若注意力不知道边界，后一行就会把前一行当作上文来学。

    办法：这里无须处理：测试证明一行单独、填充与打包时的 logits 相同。
    """


@pitfall(
    "data",
    cost="run",
    kind="construction",
    because="positions are counted from each row's own border",
    proof=[
        "tests/data/test_batches.py::test_a_batch_holds_exactly_its_rows",
        "tests/parity/test_packing.py::test_packed_padded_single_and_transformers_agree",
    ],
    sources=[
        "https://github.com/OpenRLHF/OpenRLHF/issues/377",
        "https://github.com/huggingface/transformers/issues/38007",
    ],
)
def packing_position_ids_not_reset() -> None:
    """Positions of packed rows go on counting across their borders.

    Why: The second row of a pack is then learned at positions it never has when the model is used, up to positions the
    model was never trained on.

    Fix: Nothing to do here: each row begins at position 0.

    打包后各行的位置编号跨行继续累计。

    为何：第二行会在使用时不会出现的位置上被学习，甚至超出模型训练过的范围。

    办法：这里无须处理：每一行都从位置 0 开始。
    """


@pitfall(
    "data",
    cost="launch",
    kind="construction",
    because="batches are made of arrays of token ids and masks, not of columns that somebody removes",
    proof=[
        f"{PREPARED}::test_rows_are_the_rendered_texts_and_their_answers",
        "tests/data/test_batches.py::test_a_batch_holds_exactly_its_rows",
    ],
    errors=[
        r"no columns in the dataset match the model'?s forward method signature",
        r"columns .{1,80} (?:don'?t|do not) have a corresponding argument",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/19599",
        "https://github.com/huggingface/transformers/issues/25054",
        "https://github.com/huggingface/trl/issues/1186",
        "https://github.com/huggingface/transformers/issues/7823",
    ],
)
def remove_unused_columns_wipes_dataset() -> None:
    """The trainer removes the very columns that the collator needs.

    Why: transformers drops fields whose names the model's forward does not take; behind a PEFT or compiled wrapper that
    is all of them.

    Fix: In transformers: remove_unused_columns=False. There is no such step here.

    训练器把整理函数需要的列删掉了。

    为何：transformers 会删去模型 forward 不认识的字段；套上 PEFT 或编译包装后，就等于全部删光。

    办法：在 transformers 中设 remove_unused_columns=False。这里没有这一步。
    """


@pitfall(
    "data",
    cost="run",
    kind="construction",
    because="the key of prepared rows is made of the files' contents, the tokenizer, the template's own rendering and "
    "the masking, and a kept set is compared with its hashes before it is used",
    proof=[
        f"{PREPARED}::test_each_part_of_the_key_changes_the_key",
        f"{PREPARED}::test_a_damaged_cache_is_made_again_and_says_so",
        f"{PREPARED}::test_content_of_the_same_size_is_seen",
    ],
    sources=[
        "https://github.com/OptimalScale/LMFlow/pull/394",
        "https://github.com/allenai/open-instruct/pull/1518",
        "https://github.com/dhruvdcoder/xlm-core/issues/50",
        "https://github.com/allenai/open-instruct/pull/1509",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/1136",
    ],
)
def tokenised_cache_ignores_tokenizer() -> None:
    """Token ids that another tokenizer or template made are used again from a cache.

    Why: Where the key of the cache leaves out what decides the ids, changing the model gives garbage that trains
    without an error.

    Fix: Nothing to do here; in other tools delete the cache after every change of tokenizer or template.

    缓存里由另一个分词器或模板生成的词元编号被再次使用。

    为何：若缓存的键漏掉了决定编号的因素，换模型之后喂进去的就是乱码，却能毫无报错地训练。

    办法：这里无须处理；在别的工具里，更换分词器或模板后请删除缓存。
    """


@pitfall(
    "data",
    cost="hours",
    kind="construction",
    because="workers are fresh interpreters that are started, never forked, with the tokenizer's own threads off",
    proof=[
        f"{PREPARED}::test_a_script_needs_no_main_guard",
        f"{PREPARED}::test_a_worker_that_dies_is_an_error_with_a_remedy",
    ],
    errors=[r"current process just got forked"],
    sources=[
        "https://github.com/sgl-project/SpecForge/pull/481",
        "https://github.com/huggingface/datasets/issues/620",
        "https://github.com/huggingface/datasets/pull/688",
        "https://github.com/huggingface/tokenizers/issues/187",
        "https://github.com/huggingface/transformers/issues/19702",
    ],
)
def tokenizers_fork_deadlock() -> None:
    """Preparation of rows stops for ever: a process with running tokenizer threads was forked.

    Why: A fork copies locks that threads of the parent hold, and nobody in the child will ever open them.

    Fix: In other tools set TOKENIZERS_PARALLELISM=false or start processes with spawn. Nothing to do here.

    预处理永远停住：带着分词器线程的进程被 fork 了。

    为何：fork 会复制父进程线程持有的锁，子进程里没有人能打开它们。

    办法：在别的工具里设 TOKENIZERS_PARALLELISM=false，或用 spawn 启动进程。这里无须处理。
    """

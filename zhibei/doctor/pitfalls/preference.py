"""Pits of learning from pairs and judged answers (reward models, DPO and kin). Knows counts, not pairs."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.counts import counted, found_in_rows, level_of_share, share
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.rows import PairFacts
from zhibei.doctor.pitfall import Finding, pitfall

EQUAL_SHARE, SPACING_SHARE = 0.01, 0.01
ONE_SIDED_SHARE, ENOUGH_JUDGED = 0.01, 100


def _pairs(facts: Facts) -> PairFacts | None:
    return facts.pairs if facts.pairs is not None and facts.pairs.kind == "pairs" else None


@pitfall(
    "preference",
    cost="run",
    errors=[r"\bbos\b.{0,60}\b(?:chosen|rejected)\b|\b(?:chosen|rejected)\b.{0,60}\bbegin.{0,20}\bbos\b"],
    sources=[
        "https://github.com/axolotl-ai-cloud/axolotl/issues/1616",
        "https://github.com/huggingface/trl/pull/1591",
        "https://github.com/huggingface/trl/issues/1073",
    ],
)
def dpo_bos_in_completion(facts: Facts) -> Iterable[Finding]:
    """A BOS token stands inside of an answer, or twice at the beginning of a row.

    Why: Where prompt and answer are tokenised apart with special tokens on, a BOS stands in the middle. The model has
    never seen one there, and the log-probabilities that are compared are those of a malformed row.

    Fix: Here prompt and answer are one text and one tokenisation. If a BOS still stands inside, the text or the chat
    template spells it: remove it there.

    BOS 出现在回答里面，或在行首连出现两次。

    为何：若提示与回答分别分词且都加特殊词元，中间就会多出一个 BOS。模型从未在那里见过它，
    用来比较的对数概率便是畸形序列的概率。

    办法：这里提示与回答是同一段文本、一次分词。若仍有多余的 BOS，是文本或聊天模板里写了它：请在那里去掉。
    """
    pairs = facts.pairs
    if pairs is not None and pairs.extra_bos.count:
        yield found_in_rows(
            pairs.extra_bos,
            what=f"{pairs.extra_bos.count:,} rows hold a BOS token inside of the answer or two at the beginning",
            to_do="remove the BOS from the text, or choose a template that writes it once (`zhibei data templates`)",
            level="stop",
        )


@pitfall(
    "preference",
    cost="run",
    errors=[r"chosen and rejected .{0,40}(?:identical|equal|the same)", r"\bchosen == rejected\b"],
    sources=["https://github.com/camel-ai/owl/issues/592", "https://github.com/OpenRLHF/OpenRLHF/issues/1311"],
)
def dpo_data_identical_pairs(facts: Facts) -> Iterable[Finding]:
    """Chosen and rejected are the same answer, or differ in spacing only.

    Why: Such a pair has the loss ln 2 = 0.693 for ever and no gradient; a set full of them "trains" with an accuracy
    of one half. Pairs that differ in spacing teach spacing.

    Fix: Remove them; a record whose answers are equal stops the run here unless data.on_error: drop leaves it out.

    chosen 与 rejected 相同，或只差空白。

    为何：这样的一对损失永远是 ln 2 = 0.693，没有梯度；充满它们的数据“训练”出来准确率只有一半。
    只差空白的一对只会教空白。

    办法：删除它们；这里遇到两答相同的记录会停下，除非 data.on_error: drop 把它略去。
    """
    pairs = _pairs(facts)
    if pairs is None:
        return
    read = int(pairs.audit.get("rows_read", 0)) or pairs.num_pairs
    if pairs.identical.count and share(pairs.identical.count, read) >= EQUAL_SHARE:
        yield found_in_rows(
            pairs.identical,
            what=f"{counted(pairs.identical.count, read, 'pairs')} have two equal answers and are left out",
            to_do="find out how the pairs were made: such a share is a fault of their making",
            level=level_of_share(pairs.identical.count, read),
        )
    if pairs.whitespace_only.count and share(pairs.whitespace_only.count, pairs.num_pairs) >= SPACING_SHARE:
        yield found_in_rows(
            pairs.whitespace_only,
            what=f"{counted(pairs.whitespace_only.count, pairs.num_pairs, 'pairs')} differ in spacing only",
            to_do="remove them, unless spacing is what is to be learned",
            level=level_of_share(pairs.whitespace_only.count, pairs.num_pairs),
        )


@pitfall(
    "preference",
    cost="run",
    errors=[r"(?:chosen|rejected).{0,80}(<\|(?:im_end|eot_id|end)\|>|</s>)\s*\1"],
    sources=[
        "https://github.com/huggingface/trl/issues/4481",
        "https://github.com/huggingface/trl/pull/4908",
        "https://github.com/huggingface/trl/pull/1591",
    ],
)
def dpo_double_eos(facts: Facts) -> Iterable[Finding]:
    """An answer ends with its terminator twice.

    Why: A chat template writes the end of the turn, and code that adds an EOS to every answer writes it again. The
    model learns that one end is not the end.

    Fix: Remove the terminator from the text of the answers; here the template alone writes it.

    回答末尾的结束符出现两次。

    为何：聊天模板已经写了一轮的结尾，又有代码给每个回答再加一个 EOS。模型于是学到：一个结束符还不算结束。

    办法：从回答文本里去掉结束符；这里只由模板来写。
    """
    pairs = facts.pairs
    if pairs is not None and pairs.extra_terminator.count:
        yield found_in_rows(
            pairs.extra_terminator,
            what=f"{pairs.extra_terminator.count:,} answers end with their terminator twice",
            to_do="remove the terminator from the text of the answers",
            level="stop",
        )


@pitfall(
    "preference",
    cost="run",
    kind="construction",
    because="rows are cut one by one at their end before they are batched, nothing is padded before the cut, and a row "
    "that keeps no token of its answer is dropped into the ledger",
    proof=["tests/data/test_pairs.py::test_a_prompt_that_fills_the_window_is_dropped_and_named"],
    errors=[r"logits/(?:chosen|rejected).{0,20}nan", r"truncation_mode.{0,40}(?:empty|not supported|nan)"],
    sources=["https://github.com/huggingface/trl/issues/3382"],
)
def dpo_keep_end_truncation_empty() -> None:
    """Truncation leaves nothing of a short answer but padding.

    Why: Keeping the last tokens of a batch that was padded on the right throws the short answers away; their loss is a
    mean over nothing, NaN.

    Fix: In TRL use truncation_mode keep_start or a newer version. Nothing to do here.

    截断后短回答只剩下填充。

    为何：对右侧填充的批次保留末尾，会把短回答整个丢掉；损失成了对空集求平均，即 NaN。

    办法：在 TRL 中用 truncation_mode keep_start 或升级。这里无须处理。
    """


@pitfall(
    "preference",
    cost="run",
    kind="gate",
    proof=[
        "tests/train/test_pairs.py::test_a_reference_that_moves_with_the_policy_stops_the_run",
        "tests/train/test_pairs.py::test_at_step_0_the_margin_is_0_and_afterwards_it_is_not",
    ],
    errors=[r"rewards/(?:margins|chosen|rejected).{0,40}(?:exactly|all|always) (?:0|zero)\b"],
    sources=["https://github.com/stanleylsx/llms_tool/issues/46", "https://github.com/huggingface/trl/issues/701"],
)
def dpo_ref_deepcopy_shares_peft() -> None:
    """The reference is the policy itself, so that all rewards stay exactly 0 and the loss 0.6931.

    Why: A copy of a PEFT model can share its adapter with the original, and a reference whose adapter was not switched
    off moves with the policy. Nothing fails; nothing is learned.

    Fix: Compute the reference before training or with adapters off; once the policy has moved, their log-probabilities
    must differ. A run of stage dpo tries that before its first step.

    参考模型就是策略本身，奖励恒为 0，损失恒为 0.6931。

    为何：复制 PEFT 模型可能与原模型共用适配器；没有关掉适配器的参考会随策略一起变。没有报错，也什么都没学到。

    办法：训练前先算好参考值，或关闭适配器来计算；策略一旦移动，两者的对数概率必须不同。
    stage: dpo 在第一步之前会这样验证。
    """


@pitfall("preference", cost="run", sources=["https://github.com/unslothai/unsloth-zoo/pull/830"])
def dpo_trainable_nonlora_moves_reference(facts: Facts) -> Iterable[Finding]:
    """The reference is "the base with adapters off", and something outside of the adapters learns too.

    Why: Switching adapters off does not put back embeddings or heads that were trained beside them. The reference
    drifts with the policy, and the distance to it is measured wrongly.

    Fix: Set dpo.reference: precomputed, or train the adapters only (no lora.modules_to_save).

    参考模型是“关掉适配器的基座”，但适配器之外还有参数在学习。

    为何：关闭适配器并不会还原与它一起训练的词嵌入或输出层。参考会随策略漂移，与它的距离也就量错了。

    办法：设 dpo.reference: precomputed，或只训练适配器（不用 lora.modules_to_save）。
    """
    if facts.resolved is None:
        return
    run = facts.run
    named = {"dpo": run.dpo.reference == "adapters_off", "ppo": run.ppo.models == "shared"}
    if not named.get(run.stage) or run.model.method == "full":
        return
    saved = list(run.lora.modules_to_save)
    where = facts.origin("lora.modules_to_save")
    if not saved and facts.adapter is not None:
        saved = [
            str(name)
            for field in ("modules_to_save", "trainable_token_indices")
            for name in facts.adapter.config.get(field) or ()
        ]
        where = str(facts.adapter.path / "adapter_config.json")
    if saved:
        key = "dpo.reference" if run.stage == "dpo" else "ppo.models"
        value = "precomputed" if run.stage == "dpo" else "separate"
        yield Finding(
            what=f"{', '.join(saved)} learns beside the adapters, and the reference is the base with adapters off",
            where=where,
            to_do=f"set {key}: {value}, or train the adapters only",
            changes={key: value},
        )


@pitfall("preference", cost="run")
def reference_is_not_the_start(facts: Facts) -> Iterable[Finding]:
    """The run continues an adapter, and its reference is the base without it.

    Why: The reference is meant to be the model one starts from, usually the SFT model. With that model's adapter under
    lora.adapter, "adapters off" is the raw base: at the first step the policy is already far away, and the penalty
    pulls it back to a model that cannot follow instructions.

    Fix: Merge the adapter into the base first and start from that, or have the reference computed at the start.

    训练从一个适配器继续，而参考却是没有它的基座。

    为何：参考应是起点模型，通常是 SFT 模型。若 SFT 的适配器写在 lora.adapter，“关掉适配器”得到的是原始基座：
    第一步策略就已离它很远，惩罚会把策略拉回一个不会听指令的模型。

    办法：先把适配器合并进基座再从那里开始，或在开始时算好参考值。
    """
    if facts.resolved is None:
        return
    run = facts.run
    # Policy stages keep the adapter they go on from, frozen, as their reference (model/roles.py).
    is_off = run.stage == "dpo" and run.dpo.reference == "adapters_off"
    if is_off and run.model.method != "full" and run.lora.adapter is not None:
        yield Finding(
            what=f"lora.adapter: {run.lora.adapter} is what the run starts from, and with adapters off the reference "
            "is the base without it",
            where=facts.origin("lora.adapter"),
            to_do="merge the adapter into its base and start from that (model.path), without lora.adapter; or set "
            "dpo.reference: precomputed",
            changes={"dpo.reference": "precomputed"},
        )


@pitfall("preference", cost="run", sources=["https://github.com/hiyouga/LlamaFactory/issues/3803"])
def kto_all_labelled_desirable(facts: Facts) -> Iterable[Finding]:
    """All judged answers have the same label.

    Why: KTO weighs good answers against bad ones; with one kind only there is nothing to weigh, and the run is a slow
    form of imitation. Usually a converter lost the labels.

    Fix: Correct the field of the label (`columns: {label: ...}`); both true and false must occur.

    所有被评判的回答标签都相同。

    为何：KTO 用好回答与坏回答相互权衡；只有一种就无从权衡，训练成了缓慢的模仿。通常是转换时丢了标签。

    办法：改正标签字段（`columns: {label: ...}`）；true 与 false 都要出现。
    """
    pairs = facts.pairs
    if pairs is None or pairs.kind != "judged" or not pairs.num_good + pairs.num_bad:
        return
    total, fewer = pairs.num_good + pairs.num_bad, min(pairs.num_good, pairs.num_bad)
    label = "true" if pairs.num_good else "false"
    if not fewer:
        yield Finding(
            what=f"all {total:,} answers have the label {label}",
            where="data.sources, field 'label'",
            to_do="name the field that holds the labels with columns: {label: ...}; both kinds must occur",
        )
    elif total >= ENOUGH_JUDGED and share(fewer, total) < ONE_SIDED_SHARE:
        yield Finding(
            what=f"{pairs.num_good:,} answers are labelled true and {pairs.num_bad:,} false",
            where="data.sources, field 'label'",
            to_do="bring more of the rarer kind: nearly all of the learning would come from one label",
            level="warning",
        )

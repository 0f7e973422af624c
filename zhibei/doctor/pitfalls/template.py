"""Pitfalls of chat templates: other families, other spellings in training and chatting. Knows no weights' values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.lora import trains_embeddings
from zhibei.doctor.pitfalls.tokenizer import parents

MOST_MERGED_SHARE = 0.10
"""Alpaca's own template on LLaMA-2 merges 3 rows in 100; on LLaMA-3 it is 42."""


def setting(facts: Facts, key: str) -> str:
    """Where a setting was made: `run.yaml:12`, or its name where no line of a file holds it."""
    origin = facts.origin(key)
    return origin if ":" in origin else f"{key} ({origin})"


def template_origin(facts: Facts) -> str:
    """Where the template was chosen."""
    return setting(facts, "data.template")


@pitfall(
    "template",
    cost="run",
    errors=[
        r"(?:double|two|duplicated?) (?:bos\b|begin_of_text|<\|begin_of_text)",
        r"prompt starts with 2 BOS tokens",
        r"\[?128000, 128000\b",
    ],
    sources=[
        "https://github.com/OpenRLHF/OpenRLHF/issues/393",
        "https://github.com/huggingface/open-r1/pull/462",
        "https://github.com/abetlen/llama-cpp-python/pull/1439",
        "https://github.com/sgl-project/sglang/pull/888",
        "https://github.com/MakazhanAlpamys/Soup/issues/781",
    ],
)
def double_bos_template_plus_tokenizer(facts: Facts) -> Iterable[Finding]:
    """Rows or prompts begin with two beginning-of-sequence tokens.

    Why: The template writes BOS, and the tokenizer puts another one in front. When only one side does it, the model
    is prompted with a beginning that it never saw. zhibei adds nothing while encoding, so here it can only come
    from the chat template itself.

    Fix: Take one of the two out of the chat template (`bos_token` and the token's text both stand in it).

    数据或提示以两个起始符开头。

    为何：模板写了起始符，分词器又在前面加了一个。若只有训练或只有推理如此，模型收到的开头就是它从未见过的。
    zhibei 编码时不添加任何符号，所以这里只可能来自聊天模板本身。

    办法：从聊天模板里去掉其中一个（`bos_token` 与该符号的文本同时出现在里面）。
    """
    template = facts.template
    if template is None:
        return
    row, prompt = template.bos_at_start, template.bos_in_prompt
    if max(row, prompt) > 1 or row != prompt:
        yield Finding(
            what=f"a training row begins with {row} BOS tokens, and a prompt with {prompt}",
            where=f"template {template.name} ({template_origin(facts)})",
            to_do="correct the chat template so that it writes BOS once, or choose a template of zhibei "
            "(data.template; see `zhibei data templates`)",
        )


@pitfall(
    "template",
    cost="hours",
    sources=["https://github.com/ggml-org/llama.cpp/issues/7062"],
)
def infer_prompt_misses_system_block(facts: Facts) -> Iterable[Finding]:
    """Training rows have a system prompt that nobody will send later.

    Why: The run puts one system prompt in front of every conversation. A chat program that does not send it prompts
    the model with another beginning than it learned, and the fine-tune seems lost. A default that belongs to the
    template itself travels with the model; `data.system` does not.

    Fix: Send it when chatting (`zhibei chat RUN --system TEXT`), or leave `data.system` out.

    训练数据带有系统提示，而之后没有人会发送它。

    为何：训练时每段对话前都加上同一条系统提示。聊天程序若不发送它，模型收到的开头就与所学不同，微调像是失效了。
    模板自带的默认系统提示会随模型走，`data.system` 不会。

    办法：聊天时发送它（`zhibei chat RUN --system 文本`），或不设 `data.system`。
    """
    system = (facts.run.data.system or "").strip() if facts.resolved is not None else ""
    if not system:
        return
    yield Finding(
        what=f"data.system puts {system[:60]!r} in front of every row without a system prompt",
        where=setting(facts, "data.system"),
        to_do="give the same text to every program that talks to this model (zhibei chat RUN --system TEXT)",
        level="note",
    )


@pitfall(
    "template",
    cost="run",
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/2509",
        "https://github.com/hiyouga/LlamaFactory/issues/1087",
    ],
)
def infer_template_differs_from_train(facts: Facts) -> Iterable[Finding]:
    """The run uses another template than the model was trained with.

    Why: A template is often an option of each command and tied to nothing. The same weights then score half as well,
    or a second stage unlearns the first one's turns. zhibei keeps the template in the run's manifest and in the saved
    chat template, and compares.

    Fix: Set `data.template` to that of the model's own run. A change that is meant: `accept:
    [infer-template-differs-from-train]`.

    本次运行使用的模板与该模型训练时的不同。

    为何：模板常常是每条命令各自的选项，与训练无关联。同样的权重，得分可能减半，
    或者后一阶段抹掉前一阶段学到的轮次格式。
    zhibei 把模板写进运行的清单和保存的聊天模板，并加以比较。

    办法：把 `data.template` 设为该模型训练时的模板。若确实要换：`accept: [infer-template-differs-from-train]`。
    """
    template = facts.template
    if template is None or not template.sha256:
        return
    for place, manifest in parents(facts):
        trained = manifest.get("template") or {}
        if trained.get("sha256") not in (None, template.sha256):
            yield Finding(
                what=f"template {template.name} now; {place} was trained with {trained.get('name')}"
                + (" of another spelling" if trained.get("name") == template.name else ""),
                where=template_origin(facts),
                to_do=f"set data.template: {trained.get('name')}, which the model has learned",
                level="warning" if facts.run.stage == "sft" else "stop",
                changes={"data.template": trained.get("name")},
            )


@pitfall(
    "template",
    cost="run",
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/5593",
        "https://github.com/hiyouga/LlamaFactory/issues/3813",
        "https://github.com/hiyouga/LlamaFactory/issues/5145",
    ],
)
def instruct_template_on_base(facts: Facts) -> Iterable[Finding]:
    """The template is made of control tokens that this base model never learned, and their embeddings stay frozen.

    Why: Base models carry the control tokens of their instruct siblings as reserved rows that pretraining never
    touched. Adapters on the linear layers leave the embeddings as they are, so every turn begins and ends with noise;
    the model repeats itself or never stops.

    Fix: Use a plain template (alpaca, vicuna_v1.1), or train the embeddings too: `lora.modules_to_save:
    [embed_tokens, lm_head]`, or `model.method: full`.

    模板由基座从未学过的控制符号组成，而它们的词嵌入又被冻结。

    为何：基座模型里留有指令版的控制符号，只是保留行，预训练从未触及。线性层上的适配器不改词嵌入，
    于是每一轮的开头和结尾
    都是噪声，模型会重复或停不下来。

    办法：改用普通模板（alpaca、vicuna_v1.1），或同时训练词嵌入：`lora.modules_to_save: [embed_tokens, lm_head]`，
    或 `model.method: full`。
    """
    template, tokenizer, model = facts.template, facts.tokenizer, facts.model
    if template is None or tokenizer is None or model is None or facts.run.model.method == "full":
        return
    if trains_embeddings(facts):
        return
    marks = control_ids(facts)
    to_do = "set data.template: alpaca (or vicuna_v1.1), or lora.modules_to_save: [embed_tokens, lm_head]"
    if twins := _twins({mark: model.row_norms[number] for mark, number in marks.items() if number in model.row_norms}):
        yield Finding(
            what=f"template {template.name} uses {', '.join(twins)}, whose embedding rows are equally long to the last "
            "digit: they were filled in and never trained, and adapters do not train them",
            where=template_origin(facts),
            to_do=to_do,
        )
    # Where the norms are known, lora-cannot-learn-new-eot-on-base judges them.
    elif marks and not model.median_row_norm and not (tokenizer.chat_template or template.is_the_tokenizers_own):
        yield Finding(
            what=f"template {template.name} uses {', '.join(marks)}, and {model.path} looks like a base model (its "
            "tokenizer has no chat template): these tokens may never have been trained, and adapters do not train them",
            where=template_origin(facts),
            to_do=to_do,
            level="warning",
        )


def _twins(norms: Mapping[str, float]) -> list[str]:
    """Control tokens whose rows have the same norm as another one's: trained rows never agree to seven digits."""
    rounded = Counter(f"{norm:.7g}" for norm in norms.values())
    return sorted(mark for mark, norm in norms.items() if rounded[f"{norm:.7g}"] > 1)


def control_ids(facts: Facts) -> dict[str, int]:
    """The template's control tokens that are one id each, those of every text (BOS, EOS, ...) left out."""
    template, tokenizer = facts.template, facts.tokenizer
    if template is None or tokenizer is None:
        return {}
    plain = {tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk}
    return {
        mark: ids[0]
        for mark, ids in template.special_pieces.items()
        if len(ids) == 1 and mark in tokenizer.added_tokens and mark not in plain
    }


@pitfall(
    "template",
    cost="run",
    sources=["https://github.com/oobabooga/textgen/issues/3862"],
)
def prompt_marker_tokenises_by_context(facts: Facts) -> Iterable[Finding]:
    """A prompt has other ids when chatting than in training.

    Why: Plain-text markers are tokenised together with what follows them: where the prompt ends in a colon and the
    answer begins with a newline or a smile, one token holds both. In training the model sees that token; when
    chatting it sees the prompt alone, cut at another place. Templates that end a prompt with other white space than
    training has before the answer do the same to every row.

    Fix: Use a template whose prompt ends in a newline or a control token (`alpaca_lora` instead of `alpaca`), or
    correct the chat template.

    聊天时的提示与训练时的编号不同。

    为何：普通文本的标记会和其后的文字一起切分：提示以冒号结尾、回答以换行或笑脸开头时，一个符号同时含有两者。
    训练时模型看到
    的是这个符号，聊天时看到的是在别处断开的提示。提示末尾的空白与训练时回答前的空白不同的模板，对每条数据都是如此。

    办法：使用提示以换行或控制符号结尾的模板（用 `alpaca_lora` 代替 `alpaca`），或改正聊天模板。
    """
    template, rows = facts.template, facts.rows
    if rows is not None:
        kept, merged = rows.audit.get("rows_kept") or 0, rows.audit.get("rows_with_border_merges") or 0
        if kept and merged > MOST_MERGED_SHARE * kept and facts.run.data.supervise != "everything":
            yield Finding(
                what=f"in {merged:,} of {kept:,} rows ({merged / kept:.0%}) one token holds the end of the prompt and "
                "the beginning of the answer",
                where=template_origin(facts),
                to_do="use a template whose prompt ends in a newline or a control token (data.template: alpaca_lora)",
                level="warning",
            )
    if template is None or template.knows_thinking or not template.prompt_differs:
        return
    yield Finding(
        what=f"the prompt of a chat is not how training rows begin: {template.prompt_differs}",
        where=f"template {template.name} ({template_origin(facts)})",
        to_do="correct the chat template (its add_generation_prompt must write what stands before an answer), or "
        "choose a template of zhibei (data.template)",
        level="warning",
    )

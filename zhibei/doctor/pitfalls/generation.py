"""Pitfalls of generating answers: ends that are not recognised, limits that nobody chose. Knows no training."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.template import template_origin
from zhibei.doctor.pitfalls.tokenizer import as_ids


@pitfall(
    "generation",
    kind="construction",
    cost="hours",
    because="every answer has a max_new_tokens of its own, and a max_length in generation_config.json is not read",
    proof=["tests/generate/test_limits.py::test_a_max_length_of_the_model_limits_no_answer"],
    errors=[
        r"Input length of input_ids is \d+, but `?max_length`? is set to 20",
        r"Using the model-agnostic default `max_length`",
        r"`max_length` \(=20\) to control the generation length",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/13424",
        "https://github.com/huggingface/transformers/issues/10032",
        "https://github.com/thunlp/OpenPrompt/issues/269",
    ],
)
def generation_default_length_20() -> None:
    """Every generated answer is cut at 20 tokens.

    Why: `generate()` without `max_new_tokens` falls back to a `max_length` of 20, which counts the prompt too.
    Metrics over such answers are near zero, and a good run is thrown away.

    Fix: Set `max_new_tokens` in every call, from the length of the answers in the data.

    生成的回答都在 20 个符号处被截断。

    为何：不给 `max_new_tokens` 时，`generate()` 退回到 `max_length` 20，而且把提示也算在内。这样的回答指标接近零，
    好的训练结果被误判丢弃。

    办法：每次调用都设置 `max_new_tokens`，按数据里回答的长度来定。
    """


@pitfall(
    "generation",
    cost="hours",
    sources=[
        "https://github.com/mbzuai-oryx/LLaVA-pp/issues/29",
        "https://github.com/unslothai/unsloth/issues/416",
        "https://github.com/unslothai/unsloth/issues/419",
    ],
)
def llama3_instruct_eos_vs_eot(facts: Facts) -> Iterable[Finding]:
    """Answers end in a token at which the base's generation_config.json does not stop.

    Why: The template ends turns with one token (`<|eot_id|>`), and the files of the base list another
    (`<|end_of_text|>`). Programs that read these files generate past the end, turn after turn, and a good model
    looks as if it had failed. Fully trained models are written here with both; an adapter is used with the files of
    its base.

    Fix: Add the id of the template's terminator to `eos_token_id` in the base's generation_config.json.

    回答以某个符号结束，而基座的 generation_config.json 不在它那里停止。

    为何：模板用一个符号结束每一轮（`<|eot_id|>`），基座的文件列的是另一个（`<|end_of_text|>`）。读取这些文件的程序会
    越过结尾，一轮接一轮地生成，好模型看上去像是训坏了。这里全量训练写出的模型两个都写；而适配器用的是基座的文件。

    办法：把模板结束标记的编号加进基座 generation_config.json 的 `eos_token_id`。
    """
    template, tokenizer, model = facts.template, facts.tokenizer, facts.model
    if template is None or tokenizer is None or model is None or facts.run.model.method == "full":
        return
    declared = [tokenizer.declared_ids.get(file, {}) for file in ("generation_config.json", "config.json")]
    stops = next((as_ids(ids["eos"]) for ids in declared if ids.get("eos") is not None), ())
    ends = template.terminator_ids
    if len(ends) != 1 or not stops or ends[0] in stops or ends[0] == tokenizer.ids.get("eos"):
        return
    # A terminator in plain text (Vicuna v0's ###) is a matter of stop strings, not of ids.
    if template.terminator.strip() not in tokenizer.added_tokens:
        return
    yield Finding(
        what=f"answers end in {template.terminator.strip()!r} (id {ends[0]}), and the base stops at "
        f"{', '.join(map(str, stops))} only",
        where=f"{model.folder or model.path}/generation_config.json ({template_origin(facts)})",
        to_do=f'write "eos_token_id": {sorted({*stops, ends[0]})} there, so that every program stops where answers end '
        "(zhibei chat does already)",
        level="warning",
    )


@pitfall(
    "generation",
    kind="construction",
    cost="hours",
    because="stop strings are looked for in the decoded text, and only control tokens stop by id",
    proof=[
        "tests/generate/test_stops.py::test_pieces_are_the_text_before_the_first_stop_string",
        "tests/generate/test_sampler.py::test_stop_strings_end_the_row_they_appear_in_only",
        "tests/text/test_tokenizer.py::test_only_control_tokens_stop_generation",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/22436",
        "https://github.com/huggingface/transformers/issues/26959",
        "https://github.com/ml-explore/mlx-examples/issues/524",
        "https://github.com/mosaicml/composer/pull/2902",
        "https://github.com/meta-llama/llama3/issues/228",
    ],
)
def stop_string_tokenised_out_of_context() -> None:
    """A stop string is compared by ids that it only has when it stands alone.

    Why: sentencepiece gives `###` or a newline other ids inside of a text than at its beginning, so the comparison
    never matches, and generation runs to its limit.

    Fix: Compare the decoded text (`stop_strings`), or end answers with one control token.

    停止字符串按编号比较，而那些编号只在它单独出现时才成立。

    为何：sentencepiece 对文中的 `###` 或换行给出的编号与在开头时不同，比较永远不成立，生成一直到上限。

    办法：比较解码后的文本（`stop_strings`），或用一个控制符号结束回答。
    """


@pitfall(
    "generation",
    kind="construction",
    cost="minutes",
    because="a temperature of zero means the most likely token, everywhere answers are drawn",
    proof=["tests/generate/test_sampler.py::test_greedy_answers_in_a_batch_are_those_of_transformers_one_by_one"],
    errors=[r"`?temperature`? \(=0(?:\.0)?\) has to be a strictly positive float"],
    sources=[
        "https://github.com/huggingface/transformers/pull/32077",
        "https://github.com/meta-llama/llama/issues/687",
        "https://github.com/QwenLM/Qwen2.5-Math/issues/8",
        "https://github.com/Vision-CAIR/MiniGPT-4/issues/200",
    ],
)
def temperature_zero_rejected() -> None:
    """A temperature of zero is refused.

    Why: Chat programs and evaluations ask for greedy answers by temperature 0, and libraries that divide by it
    raise an error, after the training.

    Fix: Greedy decoding: `do_sample=False` in transformers; here `temperature: 0` means just that.

    温度为零被拒绝。

    为何：聊天程序和评测常用温度 0 表示贪心解码，而直接相除的库会报错，而且是在训练之后。

    办法：使用贪心解码：transformers 中设 `do_sample=False`；这里 `temperature: 0` 就是这个意思。
    """

"""Pitfalls of masks that cannot happen here, because masks come from spans of rendered texts; each with its proof."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall

SPANS = "the mask is made from the spans of the rendered text and the tokens' character offsets; no marker is searched "
SPANS += "for, no prefix is counted, and what cannot be proved is refused"


@pitfall(
    "labels",
    kind="gate",
    cost="run",
    proof=[
        "tests/text/test_jinja.py::test_what_cannot_be_proved_is_refused",
        "tests/text/test_tokenizer.py::test_no_eos_is_an_error_with_a_remedy",
        "tests/data/test_prepare.py::test_terminators_that_are_never_learned_are_an_error",
    ],
    sources=[
        "https://github.com/johnsmith0031/alpaca_lora_4bit/issues/35",
        "https://github.com/johnsmith0031/alpaca_lora_4bit/pull/39",
        "https://github.com/tloen/alpaca-lora/issues/357",
        "https://github.com/huggingface/trl/issues/734",
    ],
)
def eos_not_appended_in_sft() -> None:
    """Targets have no end signal, so the fine-tune answers and goes on for ever.

    Why: The prompt builder never writes the end-of-sequence token. The loss looks healthy; after the answer the model
    continues with the next instruction until the limit. Every template here has a terminator that is learned, and a
    chat template or tokenizer without one is refused.

    Fix: Give the tokenizer an `eos_token`, and the chat template something that ends an answer.

    训练目标没有结束信号，微调后的模型答完还会一直说下去。

    为何：构造提示的代码从不写结束符。损失看上去正常，而模型答完后继续写下一条指令，直到上限。这里的每个模板都有会被学
    习的结束标记，没有它的聊天模板或分词器会被拒绝。

    办法：给分词器设置 `eos_token`，让聊天模板在回答之后写出结束标记。
    """


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because="the terminator of the template, whichever token it is, belongs to the answer's span and is learned",
    proof=[
        "tests/text/test_supervision.py::test_every_terminator_of_a_learned_answer_is_learned",
        "tests/text/test_jinja.py::test_marks_without_their_terminator_are_extended_to_it",
    ],
    sources=[
        "https://github.com/axolotl-ai-cloud/axolotl/issues/3754",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/3756",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/2364",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/1847",
        "https://github.com/meta-pytorch/torchtune/issues/949",
    ],
)
def eot_not_eos_masked_by_default() -> None:
    """Turns end in a token other than EOS, and that token is masked.

    Why: A framework that unmasks `eos_token` only leaves `<end_of_turn>` or `<|eot_id|>` unlearned: answers are
    right, curves are healthy, and the model never stops.

    Fix: Learn the template's own terminator; in axolotl set `eot_tokens`.

    每一轮以 EOS 之外的符号结束，而那个符号被屏蔽了。

    为何：只放开 `eos_token` 的框架，不学 `<end_of_turn>` 或 `<|eot_id|>`：回答正确，曲线正常，模型却停不下来。

    办法：学习模板自己的结束标记；在 axolotl 中设置 `eot_tokens`。
    """


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because="losses are summed, and divided once by the learned tokens of the whole step",
    proof=[
        "tests/train/test_step.py::test_however_a_step_is_cut_it_is_the_same_step",
        "tests/train/test_step.py::test_the_identity_bites_when_micro_batches_are_averaged",
    ],
    sources=[
        "https://github.com/huggingface/transformers/pull/34191",
        "https://github.com/huggingface/transformers/issues/35203",
        "https://github.com/huggingface/blog/pull/2414",
        "https://github.com/axolotl-ai-cloud/axolotl/issues/1100",
    ],
)
def grad_accum_token_normalisation() -> None:
    """The loss depends on how a batch is cut into micro-batches.

    Why: A mean per micro-batch, averaged again, gives the tokens of short micro-batches more weight. The same global
    batch learns something else on another number of accumulation steps.

    Fix: Sum losses and divide once by all learned tokens; with transformers, 4.46 or later and a model whose forward
    takes `num_items_in_batch`.

    损失随批次如何切成小批而变。

    为何：先对每个小批求平均，再对小批求平均，会让短小批里的符号权重更大。同样的总批量，换一个累积步数，学到的就不同。

    办法：把损失相加，最后一次性除以全部被学习的符号数；用 transformers 时需 4.46 以上，且模型的 forward
    接受 `num_items_in_batch`。
    """


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because="every check of the catalogue has a broken canary that must trip it, and rows without targets are dropped "
    "by a filter that a test feeds with such a row",
    proof=[
        "tests/doctor/test_canaries.py::test_what_is_broken_trips_its_check",
        "tests/data/test_prepare.py::test_rows_in_which_nothing_is_learned_go_into_the_ledger",
    ],
    sources=[
        "https://github.com/axolotl-ai-cloud/axolotl/pull/3864",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/3862",
    ],
)
def guard_filter_is_noop() -> None:
    """A guard against bad rows runs every time and never drops one.

    Why: The comparison inside of it is always true (a list against a number). Nobody sees a filter that does nothing;
    one known-bad row through it would have shown it.

    Fix: Feed each guard with a row that it must reject, at every change.

    防止坏数据的过滤器每次都运行，却从不丢弃任何一条。

    为何：其中的比较恒为真（拿列表与数比较）。不起作用的过滤器没人看得出来；放一条已知的坏数据进去就会暴露。

    办法：每次改动都用一条必须被拒绝的数据来试每个过滤器。
    """


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because=SPANS,
    proof=["tests/text/test_supervision.py::test_supervised_tokens_decode_to_answers_and_terminators"],
    sources=["https://github.com/AGI-Edgerunners/LLM-Adapters/issues/12"],
)
def mask_full_prompt_with_empty_output() -> None:
    """The prompt's length is taken from a rendering with an empty answer, which has the template's tail in it.

    Why: A template that writes something after the answer makes that "prompt" too long, and the beginning of the
    answer is masked.

    Fix: Take the mask from where the answer stands in the text.

    提示的长度取自回答为空时的渲染结果，而其中带有模板的尾部。

    为何：若模板在回答之后还会写些什么，这个“提示”就过长，回答的开头被屏蔽。

    办法：按回答在文本中的位置确定掩码。
    """


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because=SPANS,
    proof=["tests/data/test_label_promises.py::test_a_tokenizer_that_adds_eos_shifts_no_mask"],
    sources=["https://github.com/tloen/alpaca-lora/pull/306"],
)
def mask_off_by_one_add_eos() -> None:
    """The first token of every answer is masked.

    Why: The prompt alone was tokenised by a tokenizer that appends EOS, so its length is one too many.

    Fix: Subtract it, or use character offsets.

    每个回答的第一个符号被屏蔽。

    为何：单独切分提示时，分词器在末尾加了结束符，长度因此多一。

    办法：减去它，或使用字符偏移。
    """


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because="padding is masked by length, never by id, so a token that pads and ends answers is still learned",
    proof=["tests/data/test_label_promises.py::test_the_terminator_is_learned_although_it_pads"],
    sources=[
        "https://github.com/huggingface/transformers/issues/23530",
        "https://github.com/huggingface/trl/issues/976",
        "https://github.com/huggingface/blog/issues/1302",
        "https://github.com/huggingface/transformers/issues/22794",
        "https://github.com/mlabonne/llm-course/issues/33",
        "https://github.com/huggingface/open-r1/pull/494",
    ],
)
def pad_eq_eos_masked_by_collator() -> None:
    """The token that pads is the token that ends answers, and the collator masks both.

    Why: With `pad_token = eos_token`, a collator that masks every padding id masks the real end of each answer too.
    The text has its EOS, the labels have not, and the model never stops.

    Fix: Mask padding by length, or pad with a token of its own (an unused reserved one needs no new row).

    填充符就是结束符，整理批次时两者一起被屏蔽。

    为何：设 `pad_token = eos_token` 后，凡是填充编号都屏蔽的代码，会把每个回答真正的结尾也屏蔽掉。文本里有结束符，
    标签里没有，模型停不下来。

    办法：按长度屏蔽填充，或用单独的填充符（未使用的保留符号不需要新的行）。
    """


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because=SPANS,
    proof=[
        "tests/text/test_families.py::test_spans_hold_what_was_said",
        "tests/text/test_jinja.py::test_every_golden_render_is_identical",
    ],
    errors=[
        r"All labels in your dataset are -100",
        r"Could not find (?:response|instruction) (?:key|template)",
        r"response_template.{0,80}(?:not found|could not)",
    ],
    sources=["https://github.com/unslothai/unsloth/pull/10852"],
)
def response_template_no_match_all_masked() -> None:
    """The marker that should find the answers occurs nowhere, and everything is masked.

    Why: Markers typed by hand (`response_template`, `response_part`) do not match what another chat template
    writes. No span is found, no token is learned, and tools that do not count show a loss of zero.

    Fix: Take the markers from the template by rendering; here none are needed.

    用来找出回答的标记一处也没有匹配，于是全部被屏蔽。

    为何：手写的标记（`response_template`、`response_part`）与另一个聊天模板写出的不符。找不到区间，什么也不学，
    不计数的工具只显示损失为零。

    办法：通过渲染从模板得到标记；这里不需要标记。
    """


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because=SPANS,
    proof=["tests/text/test_supervision.py::test_the_mask_equals_a_slow_reference"],
    errors=[r"Most labels in your dataset are -100"],
    sources=[
        "https://github.com/unslothai/unsloth/issues/1290",
        "https://github.com/unslothai/unsloth/pull/10852",
    ],
)
def single_token_marker_not_found() -> None:
    """A marker is one token alone and other tokens in its place, so it is never found.

    Why: Ids are compared, and the ids of `[INST]` depend on the character before it.

    Fix: Compare text, or ids made in context; here no marker is searched for.

    标记单独切分是一个符号，在文中却是另外几个，于是永远找不到。

    为何：比较的是编号，而 `[INST]` 的编号取决于它前面的字符。

    办法：比较文本，或用上下文中得到的编号；这里不查找标记。
    """


@pitfall(
    "labels",
    kind="gate",
    cost="run",
    proof=[
        "tests/text/test_jinja.py::test_what_cannot_be_proved_is_refused",
        "tests/text/test_jinja.py::test_a_template_that_cuts_thoughts_from_earlier_turns",
    ],
    sources=["https://github.com/axolotl-ai-cloud/axolotl/issues/2089"],
)
def turn_boundary_search_failure() -> None:
    """Turns are found by comparing renderings, and one template breaks the search.

    Why: Templates that move the system prompt or strip spaces make two renderings differ in another place than
    where the turn begins: the end of one answer is labelled in the next, and half an answer is masked. Places are
    believed here only when taking the marks out again gives the very same text; else the template is refused.

    Fix: Mark answers with `{% generation %}` in the chat template, or name a template of zhibei.

    靠比较渲染结果寻找各轮，而某个模板使寻找失效。

    为何：移动系统提示或去掉空格的模板，使两次渲染的差异不在该轮开始之处：一个回答的结尾被标到下一轮，半个回答被屏蔽。
    这里只有把记号取出后得到完全相同的文本才采信位置，否则拒绝该模板。

    办法：在聊天模板里用 `{% generation %}` 标出回答，或改用 zhibei 的模板。
    """


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because=SPANS,
    proof=[
        "tests/text/test_supervision.py::test_the_mask_equals_a_slow_reference",
        "tests/text/test_supervision.py::test_no_learned_character_is_lost_and_no_prompt_token_is_learned",
    ],
    errors=[r"tokenization mismatch: \d+ vs\. \d+"],
    sources=[
        "https://github.com/lm-sys/FastChat/issues/2494",
        "https://github.com/lm-sys/FastChat/issues/500",
        "https://github.com/lm-sys/FastChat/issues/1289",
        "https://github.com/huggingface/transformers/issues/29126",
        "https://github.com/haotian-liu/LLaVA/issues/661",
        "https://github.com/WangHanLinHenry/SPA-RL-Agent/issues/1",
    ],
)
def vicuna_mask_offset_mismatch() -> None:
    """Turns are tokenised one by one, the lengths do not add up, and the whole row is masked.

    Why: FastChat's mask adds constants that fit one tokenizer version. Another one (legacy flag, fast, LLaMA-3)
    shifts it by one per turn; the row is then masked whole with a warning, and training goes on with what is left.

    Fix: Use offsets instead of counted lengths; never ignore the warning. The special ids may also be wrong
    (see llama-wrong-special-ids-decapoda).

    逐轮切分后长度对不上，于是整条数据被屏蔽。

    为何：FastChat 的掩码加了只适合某一版分词器的常数。换一个（legacy 开关、快速版、LLaMA-3）每轮就错开一位；
    该条数据随即整个被屏蔽，只给一条警告，训练用剩下的继续。

    办法：用偏移而不是计数；不要忽视这条警告。特殊符号的编号也可能是错的（见 llama-wrong-special-ids-decapoda）。
    """

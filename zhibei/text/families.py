"""The named templates, as data, and how one is found. Knows their spelling, not how they are rendered.

Sources of the spellings: Stanford Alpaca `train.py` PROMPT_DICT; Alpaca-LoRA `templates/*.json`; alpaca.cpp `chat.cpp`;
FastChat `conversation.py` (one_shot, vicuna_v1.1); ColossalChat's inference server; the model cards of LLaMA-2,
LLaMA-3, Mistral and Gemma; ChatML as Qwen spells it.
"""

from __future__ import annotations

from difflib import get_close_matches

from zhibei.config.errors import UserError
from zhibei.text.jinja import JinjaTemplate, require_syntax
from zhibei.text.native import Family, NativeTemplate, bind
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer

ALPACA_INTRO = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_INTRO_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_V0_SYSTEM = VICUNA_SYSTEM.replace("curious user", "curious human").replace("the user's", "the human's")


def _alpaca(name: str, about: str, *, header: str, intro: str = ALPACA_INTRO, intro_with_input: str = "") -> Family:
    return Family(
        name=name,
        about=about,
        system=("", "\n\n"),
        default_system=intro,
        default_system_with_context=intro_with_input or intro,
        user=("### Instruction:\n", "\n\n"),
        user_again="\n\n### Instruction:\n",
        context=("\n\n### Input:\n", ""),
        header=header,
        stop_strings=("### Instruction:",),
    )


_FAMILIES = (
    _alpaca(
        "alpaca",
        "Stanford Alpaca: no newline after '### Response:'",
        header="### Response:",
        intro_with_input=ALPACA_INTRO_WITH_INPUT,
    ),
    _alpaca(
        "alpaca_lora",
        "Alpaca-LoRA: as Stanford's, with a newline after '### Response:'",
        header="### Response:\n",
        intro_with_input=ALPACA_INTRO_WITH_INPUT,
    ),
    _alpaca(
        "alpaca_legacy",
        "Alpaca-LoRA's name for Stanford's spelling",
        header="### Response:",
        intro_with_input=ALPACA_INTRO_WITH_INPUT,
    ),
    _alpaca("alpaca_short", "Alpaca-LoRA without the introduction", header="### Response:\n", intro=""),
    Family(
        name="alpaca_cpp",
        about="alpaca.cpp: blank lines after the markers, none before '### Response:'",
        system=("", "\n\n"),
        default_system=ALPACA_INTRO,
        user=("### Instruction:\n\n", "\n"),
        header="### Response:\n\n",
        stop_strings=("### Instruction:",),
    ),
    Family(
        name="vicuna_v0",
        about="Vicuna v0: '### Human:' and '### Assistant:', a turn ends at '###'",
        system=("", "\n"),
        default_system=VICUNA_V0_SYSTEM,
        user=("### Human: ", "\n"),
        user_again=" Human: ",
        header="### Assistant:",
        lead=" ",
        terminator="\n###",
        stop_strings=("###",),
    ),
    Family(
        name="vicuna_v1.1",
        about="Vicuna v1.1 and v1.5: 'USER:' and 'ASSISTANT:', a turn ends at the end-of-sequence token",
        system=("", " "),
        default_system=VICUNA_SYSTEM,
        user=("USER: ", " "),
        header="ASSISTANT:",
        lead=" ",
    ),
    _alpaca(
        "coati",
        "ColossalChat (Coati): Alpaca's blocks after its own introduction",
        header="### Response:\n",
        intro=ALPACA_INTRO + " Do not generate new instructions.",
    ),
    Family(
        name="llama2",
        about="LLaMA-2 chat: [INST] ... [/INST], system prompt inside of the first turn",
        bos="each_user_turn",
        fold=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        user=("[INST] ", " [/INST]"),
        lead=" ",
        terminator=" {eos}",
        is_trimmed=True,
        needs_bos=True,
    ),
    Family(
        name="llama3",
        about="LLaMA-3 instruct: header tokens, a turn ends at <|eot_id|>",
        is_any_order=True,
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        tool=("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>"),
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        terminator="<|eot_id|>",
        stop_strings=("<|eot_id|>",),
        needed_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        is_trimmed=True,
        needs_bos=True,
    ),
    Family(
        name="chatml",
        about="ChatML (Qwen, Yi, OpenHermes): <|im_start|>role ... <|im_end|>",
        is_any_order=True,
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        tool=("<|im_start|>tool\n", "<|im_end|>\n"),
        header="<|im_start|>assistant\n",
        terminator="<|im_end|>",
        after="\n",
        stop_strings=("<|im_end|>",),
    ),
    Family(
        name="mistral",
        about="Mistral instruct v0.1-v0.3: [INST] ... [/INST], one beginning-of-sequence token",
        fold=("", "\n\n"),
        user=("[INST] ", " [/INST]"),
        lead=" ",
        is_trimmed=True,
        needs_bos=True,
    ),
    Family(
        name="gemma",
        about="Gemma: <start_of_turn>user ... <end_of_turn>, system prompt inside of the first turn",
        fold=("", "\n\n"),
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        header="<start_of_turn>model\n",
        terminator="<end_of_turn>",
        after="\n",
        stop_strings=("<end_of_turn>",),
        needed_tokens=("<start_of_turn>", "<end_of_turn>"),
        is_trimmed=True,
        needs_bos=True,
    ),
)

TEMPLATES: dict[str, Family] = {family.name: family for family in _FAMILIES}
"""Every native family by name; `tokenizer` (the tokenizer's own chat template) and `auto` are found besides these."""

ALIASES = {
    "stanford_alpaca": "alpaca",
    "vicuna": "vicuna_v1.1",
    "vicuna_v1": "vicuna_v1.1",
    "vicuna_v1.5": "vicuna_v1.1",
    "vicuna_v1_1": "vicuna_v1.1",
    "vicuna_0": "vicuna_v0",
    "colossalchat": "coati",
    "llama-2": "llama2",
    "llama_2": "llama2",
    "llama-3": "llama3",
    "llama_3": "llama3",
    "llama3.1": "llama3",
    "qwen": "chatml",
    "chat_ml": "chatml",
    "alpaca.cpp": "alpaca_cpp",
    "alpaca-lora": "alpaca_lora",
    "chat_template": "tokenizer",
    "own": "tokenizer",
}


def find_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template called `name`, bound to the special tokens of `tokenizer`.

    `auto` means the tokenizer's own chat template, else `alpaca`. UserError: an unknown name (with the nearest),
    `tokenizer` where the tokenizer has no chat template, a family whose markers this tokenizer does not know.
    """
    wanted = ALIASES.get(name.lower(), name.lower())
    if wanted == "auto":
        wanted = "tokenizer" if tokenizer.chat_template else "alpaca"
    if wanted == "tokenizer":
        return _own_template(tokenizer)
    if wanted not in TEMPLATES:
        known = [*TEMPLATES, "tokenizer", "auto"]
        near = get_close_matches(wanted, [*known, *ALIASES], n=1, cutoff=0.5)
        raise UserError(
            f"no template is called {name!r}",
            expected="one of " + ", ".join(known),
            fix=f"data.template: {near[0] if near else 'auto'}",
            where="data.template",
        )
    return _native(TEMPLATES[wanted], tokenizer)


def _own_template(tokenizer: Tokenizer) -> JinjaTemplate:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.source} has no chat template",
            expected="a chat_template in tokenizer_config.json, or chat_template.jinja beside it",
            fix="name a template, e.g. data.template: alpaca (see `zhibei data templates`)",
            where="data.template",
        )
    require_syntax(tokenizer.chat_template, where=f"the chat template of {tokenizer.source}")
    return JinjaTemplate(
        source=tokenizer.chat_template,
        special_tokens=dict(tokenizer.named_specials),
        marks=tokenizer.special_strings,
    )


def _native(family: Family, tokenizer: Tokenizer) -> NativeTemplate:
    missing = [token for token in family.needed_tokens if not tokenizer.is_special(token)]
    if missing:
        raise UserError(
            f"template {family.name} is made of {', '.join(missing)}, which are not tokens of {tokenizer.source}",
            expected="a tokenizer that reads each of these markers as one token",
            fix="use the template of this model's own family (data.template: auto), or alpaca for a base model",
            where="data.template",
            pitfall="wrong-family-template",
        )
    has_bos = tokenizer.adds_bos or family.needs_bos
    return bind(family, bos=tokenizer.bos if has_bos else "", eos=tokenizer.eos)

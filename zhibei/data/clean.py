"""Rules that find suspicious rows: one function each, its docstring is the reason. Knows no files and changes nothing.

They follow the defect classes that the cleaners of the Alpaca data found and the rules by which Vicuna's
conversations were cleaned, as far as a rule can decide them. A hit is a reason to look at the row, not a verdict.
Answers that are wrong or nonsensical are out of reach of rules, but for arithmetic that can be redone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zhibei.data.records import Conversation, Judged, PlainText, Preference, Prompt, Record
from zhibei.text.messages import Message


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question (with Alpaca's input as `context`) and one answer to it. Plain text is an answer to nothing."""

    question: str
    context: str
    answer: str


def exchanges(record: Record) -> Iterator[Exchange]:
    """Every question and answer of a record; both answers of a preference."""
    if isinstance(record, PlainText):
        yield Exchange("", "", record.text)
    elif isinstance(record, Conversation):
        yield from _pairs(record.messages)
    elif isinstance(record, Preference):
        yield from _pairs(record.prompt + record.chosen)
        yield from _pairs(record.rejected)
    elif isinstance(record, Judged):
        yield from _pairs(record.prompt + record.answer)
    else:
        assert isinstance(record, Prompt)
        yield from (Exchange(message.content, message.context, "") for message in record.messages)


def _pairs(messages: tuple[Message, ...]) -> Iterator[Exchange]:
    asked = Message("user", "")
    for message in messages:
        if message.role == "user":
            asked = message
        elif message.role == "assistant":
            yield Exchange(asked.content, asked.context, message.content)
            asked = Message("user", "")


NO_INPUT = re.compile(r"\W*(no[\s_-]*(input|context)\w*|none|null|nan|n/?a|not applicable|empty)\W*", re.I)
NOT_ANSWERED = re.compile(r"\W*(n/?a|none|null|nan|no ?output|output|not applicable|not available|todo|tbd)\W*", re.I)
LINK = re.compile(r"https?://[^\s)\]}>\"']+|\bwww\.[\w-]+\.\w+", re.I)
MERGED = re.compile(r"\b\d{1,2}\.\s*Instruction:|\n#*\s*Instruction:|\n\d{1,2}\.\s*(Input|Output):", re.I)
DISCLAIMER = re.compile(
    r"\bas an? (ai|artificial intelligence|(large )?language model)\b"
    r"|\bas of my (last |latest )?(knowledge|training|update)|\bmy (knowledge|training) cut-?off\b"
    r"|\bi (can(no|')t|am unable to|do ?n[o']t have the ability to) (browse|access the internet)"
    r"|作为一个?(人工智能|ai|语言模型)",
    re.I,
)
OTHER_MODEL = re.compile(r"\b(open ?ai|chatgpt|gpt-?[345]\w*|anthropic|claude|bard)\b", re.I)
EMPTY_TAG = re.compile(r"<(code|pre)>\s*</\1>")
CODE_BLOCK = re.compile(r"```[\w+-]*\s*(.*?)```", re.S)
PICTURE = re.compile(
    r"!\[[^\]]*\]\(http|\bimg\s?src\s?=|\bimage:|^\s*(please )?(draw|sketch|paint|photograph)\b"
    r"|\b(generate|create|design|make|produce|show|attach)\b[^.\n]{0,40}\b(image|picture|photo|drawing|sketch|painting|"
    r"illustration|logo|diagram|flow ?chart|graph|video|animation|gif)\b",
    re.I,
)
NUMBERED = re.compile(r"^\s*(\d{1,3})[.)]\s", re.M)
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff]")
MOJIBAKE = re.compile("Ã[\x80-\xbf©¨¤¶¼±]|â€[\x80-\xbf™œžŸ˜“”¦\u2013\u2014]|ï»¿|Â[\xa0-\xbf]|锟斤拷|烫烫烫")
TAGS = re.compile(r"</?(div|span|p|br|td|tr|table|tbody|font|ul|ol|li|script|style)\b[^<>]{0,200}>", re.I)
ENTITY = re.compile(r"&(lt|gt|amp|nbsp|quot|apos|#x?[0-9a-f]{2,5});|Copy code\b", re.I)
MARKUP_TOPIC = re.compile(r"html|xml|markup|\btags?\b|web ?(page|site)|css|javascript|react|escape|entit", re.I)
ESCAPED = re.compile(r"\\n(?![a-z])|\\t(?![a-z])|\\_(?!_)")
CODE_TOPIC = re.compile(
    r"code|program|function|script|regex|regular expr|latex|python|java|print|string|escape|c\+\+|sql|json|代码|函数",
    re.I,
)
DIGITS = re.compile(r"(\d)\1{8}")
MARKERS = re.compile(
    r"<\|(im_start|im_end|endoftext|eot_id|start_header_id|assistant|user|system)\|>|</?s>|\[/?INST\]|<<SYS>>"
    r"|^(### ?(Human|Assistant|Instruction|Response|Input)|(Human|Assistant|USER|ASSISTANT|User|Bot)):"
    r"|^(用户|人类|助手|助理|机器人)[：:]",
    re.M,
)
SERVICE = re.compile(
    r"too many requests in 1 hour|^!?network error|an error occurred\. (either|if this)"
    r"|something went wrong\. if this issue|there was an error generating a response",
    re.I,
)
SUM = re.compile(
    r"\s*(?:what(?:'s| is)|calculate|compute|evaluate|solve|find|simplify)?\s*"
    r"(?:the (?:value|result|sum|product) of)?\s*:?\s*"
    r"(-?\d+(?:\.\d+)?)\s*([-+*x×/÷])\s*(-?\d+(?:\.\d+)?)\s*[=?.]*\s*",
    re.I,
)
CALCULATOR = re.compile(r"<<(-?[\d.]+)([-+*/])([\d.]+)=(-?[\d.]+)>>")
LAST_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "x": lambda a, b: a * b,
    "×": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else float("nan"),
    "÷": lambda a, b: a / b if b else float("nan"),
}


def no_input_phrase(it: Exchange) -> bool:
    """The input is a word for "nothing" (<noinput>, None, N/A); leave it empty, or the model learns the word."""
    return bool(it.context) and NO_INPUT.fullmatch(it.context) is not None


def merged_instructions(it: Exchange) -> bool:
    """Several tasks ran together into one row when the data was generated."""
    return bool(MERGED.search(it.question) or MERGED.search(it.answer))


def link_in_question(it: Exchange) -> bool:
    """The task needs a page on the internet, which a model cannot open; the answer was made up."""
    return bool(LINK.search(it.question) or LINK.search(it.context))


def made_up_link(it: Exchange) -> bool:
    """The answer has a web address that the question does not have; most of those do not exist."""
    return any(link not in it.question and link not in it.context for link in _found(LINK, it.answer))


def assistant_disclaimer(it: Exchange) -> bool:
    """ "As an AI language model", "as of my knowledge cutoff": another model's phrase, which yours would repeat."""
    return bool(DISCLAIMER.search(it.answer))


def names_another_model(it: Exchange) -> bool:
    """The answer names another model or its maker, and the question does not; yours would claim to be it."""
    return bool(OTHER_MODEL.search(it.answer)) and not OTHER_MODEL.search(it.question + it.context)


def placeholder_answer(it: Exchange) -> bool:
    """The answer is N/A, none, <nooutput> or the like."""
    return NOT_ANSWERED.fullmatch(it.answer) is not None


def empty_code(it: Exchange) -> bool:
    """A code block without code."""
    if "```" in it.answer and not all(block.strip() for block in CODE_BLOCK.findall(it.answer)):
        return True
    return bool(EMPTY_TAG.search(it.answer))


def asks_for_picture(it: Exchange) -> bool:
    """The task wants a picture, drawing or video, which a text model cannot give (or shows one it cannot see)."""
    return bool(PICTURE.search(it.question) or "img src=" in it.context or "![" in it.context)


def broken_numbering(it: Exchange) -> bool:
    """A numbered list starts again at 1 before it came to 2."""
    numbers = _found(NUMBERED, it.answer)
    return any(first == second == "1" for first, second in itertools.pairwise(numbers))


def control_characters(it: Exchange) -> bool:
    """Control or zero-width characters, which show nothing and cost tokens."""
    return _anywhere(CONTROL, it)


def replacement_characters(it: Exchange) -> bool:
    """The character U+FFFD: the text was once decoded wrongly, and something is lost."""
    return any("\ufffd" in text for text in (it.question, it.context, it.answer))


def mojibake(it: Exchange) -> bool:
    """UTF-8 that was read as another encoding (â€™ for an apostrophe, Ã© for é)."""
    return _anywhere(MOJIBAKE, it)


def html_remnants(it: Exchange) -> bool:
    """HTML tags, entities or a "Copy code" button outside of code, in an answer that is not about HTML."""
    if "<" not in it.answer and "&" not in it.answer and "Copy code" not in it.answer:
        return False
    text = outside_code(it.answer)
    return bool(TAGS.search(text) or ENTITY.search(text)) and not MARKUP_TOPIC.search(it.question + it.context)


def escaped_characters(it: Exchange) -> bool:
    """A written-out \\\\n, \\\\t or \\\\_ where a line break, tab or underscore was meant; not in code."""
    if "\\" not in it.answer + it.question or CODE_TOPIC.search(it.question) or "$" in it.answer:
        return False
    return bool(ESCAPED.search(outside_code(it.answer)) or ESCAPED.search(outside_code(it.question)))


def digit_flood(it: Exchange) -> bool:
    """The same digit nine times in a row."""
    return bool(DIGITS.search(it.answer) or DIGITS.search(it.question))


def answer_repeats_question(it: Exchange) -> bool:
    """The answer is the question, or its input, word for word."""
    answer = it.answer.strip()
    return bool(answer) and len(answer) > 3 and answer in (it.question.strip(), it.context.strip())


def cut_off_answer(it: Exchange) -> bool:
    """A long answer that stops in the middle: an open code block, or no full stop at the end of a sentence."""
    text = it.answer.rstrip()
    if len(text) < 200 or not it.question:
        return False
    if text.count("```") % 2:
        return True
    last = text.rsplit("\n", 1)[-1]
    if last.split()[-1].startswith(("#", "@", "http")):
        return False
    return len(last.split()) > 8 and (text[-1].isalpha() or text[-1] in ",;-(") and _is_cased(text[-1])


def repeated_lines(it: Exchange) -> bool:
    """The same line or sentence five times in a row: a model that did not stop."""
    parts = [part.strip() for part in re.split(r"[\n.!?。！？]", it.answer) if len(part.strip()) > 3]
    return any(len(set(parts[i : i + 5])) == 1 for i in range(len(parts) - 4))


def role_markers(it: Exchange) -> bool:
    """Speakers' names or special tokens inside of a turn: a whole dialogue was put into one field."""
    return _anywhere(MARKERS, it)


def service_message(it: Exchange) -> bool:
    """An error message of the service the answer was copied from."""
    return bool(SERVICE.search(it.answer[:300]))


def wrong_arithmetic(it: Exchange) -> bool:
    """A sum of two numbers with a wrong result (as the whole task, or between the << >> of a worked solution)."""
    for left, sign, right, result in CALCULATOR.findall(it.answer):
        try:
            if abs(OPERATIONS[sign](float(left), float(right)) - float(result)) > 0.011 * max(1.0, abs(float(result))):
                return True
        except ValueError:
            continue
    asked = SUM.fullmatch(f"{it.question} {it.context}".strip())
    numbers = LAST_NUMBER.findall(it.answer) if asked else []
    if not asked or not numbers or "/" in "".join(numbers):
        return False
    true = OPERATIONS[asked[2].lower()](float(asked[1]), float(asked[3]))
    return not any(abs(float(number.replace(",", "")) - true) <= 0.01 * max(1.0, abs(true)) for number in numbers)


def outside_code(text: str) -> str:
    """The text without code between backticks."""
    return re.sub(r"```.*?(```|$)|`[^`\n]*`", "", text, flags=re.S) if "`" in text else text


def _found(pattern: re.Pattern[str], text: str) -> list[str]:
    return pattern.findall(text)


def _anywhere(pattern: re.Pattern[str], it: Exchange) -> bool:
    return bool(pattern.search(it.answer) or pattern.search(it.question) or pattern.search(it.context))


def _is_cased(letter: str) -> bool:
    """Letters of scripts with full stops like ours; others end sentences in ways this module does not know."""
    return letter.lower() != letter.upper() or letter in ",;-("


RULES: dict[str, Callable[[Exchange], bool]] = {
    rule.__name__: rule
    for rule in (
        no_input_phrase,
        merged_instructions,
        link_in_question,
        made_up_link,
        assistant_disclaimer,
        names_another_model,
        placeholder_answer,
        empty_code,
        asks_for_picture,
        broken_numbering,
        control_characters,
        replacement_characters,
        mojibake,
        html_remnants,
        escaped_characters,
        digit_flood,
        answer_repeats_question,
        cut_off_answer,
        repeated_lines,
        role_markers,
        service_message,
        wrong_arithmetic,
    )
}
"""Every rule by name; `reason` gives its sentence."""


def reason(name: str) -> str:
    """Why a row with this finding is worth a look."""
    return " ".join((RULES[name].__doc__ or "").split())


def findings(record: Record) -> list[str]:
    """Names of the rules that one of the record's exchanges trips."""
    pairs = list(exchanges(record))
    return [name for name, rule in RULES.items() if any(rule(pair) for pair in pairs)]

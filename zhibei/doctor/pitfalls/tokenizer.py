"""Pitfalls of tokenizers: ids that other files contradict, that the embedding lacks, that two versions spell apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.text import TokenizerFacts
from zhibei.doctor.pitfall import Finding, pitfall


def parents(facts: Facts) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(what, manifest) of the runs that the model and the adapter came from."""
    if facts.model is not None and facts.model.parent_manifest is not None:
        yield facts.model.path, facts.model.parent_manifest
    if facts.adapter is not None and facts.adapter.manifest is not None:
        yield str(facts.adapter.path), facts.adapter.manifest


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """One id or several, as config files write them."""
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def special_differences(tokenizer: TokenizerFacts, manifest: Mapping[str, Any]) -> list[str]:
    """Where the ids of BOS and EOS are not those of the run that the manifest describes."""
    trained = manifest.get("special_ids") or {}
    return [
        f"{name} is {tokenizer.ids.get(name)} now and was {trained[name]} in training"
        for name in ("bos", "eos")
        if name in trained and trained[name] != tokenizer.ids.get(name)
    ]


def uses_ids_beyond(facts: Facts) -> bool:
    """Whether ids without an embedding row would be met: in rows, as special ids, in the template, or by plain text."""
    tokenizer, model = facts.tokenizer, facts.model
    if tokenizer is None or model is None or model.embedding_rows is None:
        return False
    rows = model.embedding_rows
    template = facts.template.special_pieces.values() if facts.template is not None else ()
    met = [number for number in tokenizer.ids.values() if number is not None]
    met += [number for ids in template for number in ids]
    num_added = sum(number >= rows for number in tokenizer.added_tokens.values())
    is_met = facts.rows is None or facts.rows.highest_id >= rows or max(met, default=0) >= rows
    return tokenizer.highest_id >= rows and (is_met or tokenizer.highest_id + 1 - num_added > rows)


def _source(tokenizer: TokenizerFacts, file: str) -> str:
    return f"{tokenizer.source}/{file}"


@pitfall(
    "tokenizer",
    cost="run",
    sources=[
        "https://github.com/huggingface/transformers/issues/22794",
        "https://github.com/huggingface/trl/issues/734",
    ],
)
def fast_tokenizer_ignores_add_eos(facts: Facts) -> Iterable[Finding]:
    """The tokenizer is asked to add the end-of-sequence token, and does not; or adds it to prompts too.

    Why: Many fast tokenizers fix their post-processor when they are built, so `add_eos_token` changes nothing: code
    that relies on it trains without an end signal. Where it does work, prompts end in EOS as well, and the model is
    asked to go on after its own full stop. zhibei's templates write the terminator themselves, so rows here are
    right; the setting is saved with the model and misleads whoever loads it.

    Fix: Remove `add_eos_token` from tokenizer_config.json (or rebuild tokenizer.json without it).

    分词器被要求添加结束符却没有添加，或者连提示也被加上结束符。

    为何：许多快速分词器的后处理器在构建时就已固定，`add_eos_token` 不起作用，依赖它的代码训练时没有结束信号。
    在它起作用的地方，提示末尾也会带上结束符，模型要在自己的句号之后继续。zhibei 的模板自己写结束符，
    所以这里的数据是对的；
    但这个设置会随模型保存，误导之后加载它的人。

    办法：从 tokenizer_config.json 删去 `add_eos_token`（或重建不带它的 tokenizer.json）。
    """
    tokenizer = facts.tokenizer
    if tokenizer is None or not (tokenizer.asks_eos or tokenizer.adds_eos):
        return
    what = (
        f"the tokenizer appends {tokenizer.eos!r} to every text, prompts included"
        if tokenizer.adds_eos
        else f"add_eos_token is true, and the tokenizer does not append {tokenizer.eos!r}"
    )
    yield Finding(
        what=f"{what}; rows are right all the same, because the template writes its terminator",
        where=_source(tokenizer, "tokenizer_config.json"),
        to_do="set add_eos_token to false there, so that programs that load the trained model are not misled",
        level="warning" if tokenizer.adds_eos else "note",
    )


@pitfall(
    "tokenizer",
    cost="run",
    errors=[r"You are using the (?:default )?legacy behaviou?r of the"],
    sources=[
        "https://github.com/huggingface/transformers/issues/25716",
        "https://github.com/huggingface/transformers/pull/24565",
        "https://github.com/huggingface/transformers/issues/29872",
    ],
)
def legacy_flag_changes_between_versions(facts: Facts) -> Iterable[Finding]:
    """The tokenizer spells texts differently than when the model was trained.

    Why: The `legacy` flag, the class or a converted tokenizer.json decide whether a space is put in front of a word
    after a special token. After an upgrade or a new conversion the same text has other ids: labels shift by one,
    and a fine-tune is prompted with pieces it never saw.

    Fix: Use the tokenizer that lies in the trained model's folder; it was saved whole.

    分词器对同一文本的切分与训练该模型时不同。

    为何：`legacy` 开关、分词器的类、重新转换的 tokenizer.json，决定特殊符号之后的词前面是否加空格。
    升级或重新转换之后，
    同一文本得到另外的编号：标签错开一位，微调过的模型收到从未见过的片段。

    办法：使用训练所得模型文件夹里的分词器，它是完整保存的。
    """
    tokenizer = facts.tokenizer
    if tokenizer is None or not tokenizer.fingerprint:
        return
    for place, manifest in parents(facts):
        trained = (manifest.get("tokenizer") or {}).get("sha256")
        if trained is None or trained == tokenizer.fingerprint or special_differences(tokenizer, manifest):
            continue
        yield Finding(
            what=f"tokenizer {tokenizer.fingerprint[:12]}… now; {place} was trained with {trained[:12]}…",
            where=facts.origin("model.tokenizer") if facts.run.model.tokenizer else tokenizer.source,
            to_do="use the tokenizer in the folder of the trained model (remove model.tokenizer), or undo its changes",
        )


@pitfall(
    "tokenizer",
    cost="run",
    errors=[
        r"bos_token_id\W{1,4}(?:-1|0)\b.{0,80}eos_token_id\W{1,4}1\b",
        r"tokenization mismatch: \d+ vs",
        r"pad_token_id. should be positive but got -?\d",
    ],
    sources=[
        "https://github.com/lm-sys/FastChat/issues/1290",
        "https://github.com/lm-sys/FastChat/issues/1289",
        "https://github.com/lm-sys/FastChat/issues/470",
    ],
)
def llama_wrong_special_ids_decapoda(facts: Facts) -> Iterable[Finding]:
    """The files of the model name other special ids than its vocabulary has.

    Why: Early conversions of LLaMA carried bos 0, eos 1 and pad -1 with empty token texts, where the vocabulary has
    1 and 2. Code that takes ids from config.json trains an end signal that is another token, and code that counts
    tokens masks every target.

    Fix: Correct config.json and tokenizer_config.json to the ids of the vocabulary (LLaMA: bos `<s>` 1, eos `</s>` 2,
    unk `<unk>` 0), or take the files of a newer conversion. Rows that were tokenised elsewhere must be made again.

    模型的文件所写的特殊符号编号与词表不一致。

    为何：早期转换的 LLaMA 写着 bos 0、eos 1、pad -1，符号文本为空，而词表里是 1 和 2。按 config.json 取编号的代码，
    学到的结束信号是别的符号；靠计数来屏蔽的代码，会把所有目标都屏蔽掉。

    办法：把 config.json 和 tokenizer_config.json 改成词表里的编号（LLaMA：bos `<s>` 1、eos `</s>` 2、
    unk `<unk>` 0），
    或换用较新的转换。在别处切分过的数据要重做。
    """
    tokenizer = facts.tokenizer
    if tokenizer is None:
        return
    for what in tokenizer.misplaced:
        yield Finding(
            what=what,
            where=_source(tokenizer, "tokenizer_config.json"),
            to_do="correct the special tokens there (and in tokenizer.json) to those of tokenizer.model",
        )
    where = f"{facts.model.folder if facts.model and facts.model.folder else tokenizer.source}/config.json"
    declared = tokenizer.declared_ids.get("config.json", {})
    for name, value in declared.items():
        negative = [one for one in as_ids(value) if one < 0]
        if negative:
            yield Finding(
                what=f"{name}_token_id is {negative[0]}, which is no token",
                where=where,
                to_do=f"set it there to {tokenizer.ids.get(name)} ({getattr(tokenizer, name, None)!r}), or to null",
                level="warning",
            )
    for name in ("bos", "eos"):
        mine, theirs = tokenizer.ids.get(name), [one for one in as_ids(declared.get(name)) if one >= 0]
        if mine is None or not theirs or mine in theirs:
            continue
        if name == "eos" and mine in as_ids(tokenizer.declared_ids.get("generation_config.json", {}).get("eos")):
            continue
        yield Finding(
            what=f"{name}_token_id is {', '.join(map(str, theirs))}, and the tokenizer's "
            f"{getattr(tokenizer, name)!r} has id {mine}",
            where=where,
            to_do=f"set {name}_token_id to {mine} there, or use the tokenizer that belongs to this model",
            level="stop" if name == "eos" or tokenizer.adds_bos else "warning",
        )


@pitfall(
    "tokenizer",
    kind="construction",
    cost="run",
    because="no stage adds tokens or resizes an embedding: padding takes a token that exists, templates whose control "
    "tokens are missing are refused, and ids beyond the embedding stop the run",
    proof=[
        "tests/text/test_tokenizer.py::test_padding_takes_an_existing_token_and_never_a_new_one",
        "tests/text/test_families.py::test_a_family_of_control_tokens_needs_a_tokenizer_that_knows_them",
    ],
    sources=["https://github.com/hiyouga/LlamaFactory/pull/10547"],
)
def new_token_rows_misplaced_in_padded_embedding() -> None:
    """The rows of new tokens are initialised at the end of an embedding that is longer than the vocabulary.

    Why: Embeddings are padded to a round number of rows. An initialiser that writes the last rows hits the padding,
    and the new ids, which lie before it, stay as they were.

    Fix: Write rows by token id. Models that got such rows elsewhere show it as control tokens with untrained rows
    (see instruct-template-on-base).

    新增符号的初值被写到了比词表更长的词嵌入的末尾。

    为何：词嵌入的行数常凑成整数。按“最后几行”初始化会写到填充行上，而新编号在它们之前，仍是原来的样子。

    办法：按编号写行。若别处已造成这种模型，表现为控制符号的行未经训练（见 instruct-template-on-base）。
    """


@pitfall(
    "tokenizer",
    cost="run",
    sources=[
        "https://github.com/huggingface/transformers/issues/24569",
        "https://github.com/huggingface/transformers/issues/23889",
        "https://github.com/huggingface/transformers/issues/25700",
        "https://github.com/huggingface/transformers/issues/26287",
        "https://github.com/huggingface/transformers/issues/35973",
    ],
)
def slow_fast_space_after_special(facts: Facts) -> Iterable[Finding]:
    """tokenizer.json and tokenizer.model give other ids for the same text.

    Why: Slow tokenizers, llama.cpp and some servers read tokenizer.model; fast ones read tokenizer.json. Where the
    two differ, a model is trained on one spelling and served with another, and nothing says so.

    Fix: Keep the file that the base was trained with and build the other from it:
    `AutoTokenizer.from_pretrained(PATH, use_fast=True)` on a folder without tokenizer.json.

    tokenizer.json 与 tokenizer.model 对同一文本给出不同的编号。

    为何：慢速分词器、llama.cpp 和一些服务读取 tokenizer.model，快速分词器读取 tokenizer.json。两者不一致时，
    模型按一种切分训练，按另一种切分服务，而没有任何提示。

    办法：保留基座训练时所用的文件，并由它生成另一个：在没有 tokenizer.json 的文件夹上执行
    `AutoTokenizer.from_pretrained(路径, use_fast=True)`。
    """
    tokenizer = facts.tokenizer
    if tokenizer is None:
        return
    to_do = "keep the file that belongs to this model, and make the other one from it (see the page of this pitfall)"
    if tokenizer.other_vocabulary:
        yield Finding(what=tokenizer.other_vocabulary, where=tokenizer.source, to_do=to_do)
    elif tokenizer.slow_fast_difference:
        yield Finding(what=tokenizer.slow_fast_difference, where=tokenizer.source, to_do=to_do, level="warning")


@pitfall(
    "tokenizer",
    cost="launch",
    errors=[
        r"srcIndex < srcSelectDimSize",
        r"indexSelect(?:Large|Small)Index.{0,120}Assertion",
        r"IndexError: index out of range in self",
        r"vectorized_gather_kernel.{0,120}index out of bounds",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/24698",
        "https://github.com/huggingface/transformers/issues/1848",
        "https://github.com/shibing624/MedicalGPT/issues/275",
        "https://github.com/AkariAsai/self-rag/issues/91",
        "https://github.com/sillsdev/silnlp/issues/1033",
        "https://github.com/InternRobotics/PointLLM/issues/46",
    ],
)
def token_id_beyond_embedding(facts: Facts) -> Iterable[Finding]:
    """The tokenizer has ids for which the model has no embedding row.

    Why: Tokens were added without resizing the model, or tokenizer and model are of different revisions. On a GPU the
    failure is a device-side assert that names another line, and the process is dead afterwards.

    Fix: Use the tokenizer that belongs to the weights, remove the added tokens, or resize the embedding with
    transformers (`resize_token_embeddings`), save the model and train the new rows.

    分词器的某些编号在模型的词嵌入里没有对应的行。

    为何：添加了符号却没有扩展模型，或分词器与模型版本不同。在显卡上报错为 device-side assert，指向无关的一行，
    进程随即作废。

    办法：使用与权重配套的分词器，删去添加的符号，或用 transformers 扩展词嵌入（`resize_token_embeddings`）后保存，
    并训练新的行。
    """
    tokenizer, model = facts.tokenizer, facts.model
    if tokenizer is None or model is None or model.embedding_rows is None:
        return
    rows = model.embedding_rows
    highest = max(tokenizer.highest_id, facts.rows.highest_id if facts.rows is not None else 0)
    # Added tokens that nothing here would meet: gguf-vocab-model-32000-tok-32001 warns of those.
    if highest >= rows and (uses_ids_beyond(facts) or tokenizer.highest_id < rows):
        beyond = sorted(token for token, number in tokenizer.added_tokens.items() if number >= rows)
        names = f" ({', '.join(map(repr, beyond[:4]))})" if beyond else ""
        used = facts.rows is not None and facts.rows.highest_id >= rows
        yield Finding(
            what=f"ids up to {highest:,}{names}, and the model has {rows:,} embedding rows"
            + ("; rows of the data use them" if used else ""),
            where=tokenizer.source,
            to_do=f"use the tokenizer of {model.path}, or resize its embedding to {highest + 1:,} rows or more",
        )
    for file in ("config.json", "generation_config.json"):
        for name, value in tokenizer.declared_ids.get(file, {}).items():
            if any(one >= rows for one in as_ids(value)):
                sound = tokenizer.ids.get(name) or tokenizer.ids.get("eos")
                yield Finding(
                    what=f"{name}_token_id is {value}, and the model has {rows:,} embedding rows",
                    where=f"{model.folder or model.path}/{file}",
                    to_do=f"set {name}_token_id to an id below {rows:,}, e.g. {sound}",
                )

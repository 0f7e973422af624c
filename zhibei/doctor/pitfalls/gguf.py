"""What stops a trained model from becoming a GGUF file. Knows facts and messages, no converter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.tokenizer import uses_ids_beyond

FILES, WORDS = (f"tests/export/test_gguf_{name}.py" for name in ("files", "words"))

FEWEST_TOKENS = 1000
"""Vocabularies of toy models have any size."""
MOST_ADDED = 7


@pitfall(
    "gguf",
    cost="hours",
    kind="construction",
    because="The prompt of a GGUF file begins with BOS once, whoever writes it: file, template or both.",
    proof=[f"{WORDS}::test_bos_stands_in_front_once_whoever_writes_it"],
    errors=[
        r"added a BOS token to the prompt as specified by the model but the prompt also starts with a BOS",
        r"double BOS",
        r"two (?:BOS|<\|begin_of_text\|>)",
    ],
    sources=[
        "https://github.com/abetlen/llama-cpp-python/pull/1439",
        "https://github.com/unslothai/unsloth/issues/3899",
    ],
)
def gguf_double_bos_at_inference() -> None:
    """A GGUF model gets two BOS tokens, one from the tokenizer and one from the template.

    Why: The file says add_bos_token and its chat template writes BOS too. The model was trained with one, so
    answers are a little worse everywhere, without an error.

    Fix: Let only one of them add it: strip BOS from the rendered prompt, or set tokenizer.ggml.add_bos_token to
    false.

    GGUF 模型收到两个 BOS，一个来自分词器，一个来自模板。

    为何：文件里写了 add_bos_token，对话模板又写一次 BOS；训练时只有一个，于是处处略差而没有报错。

    办法：只让其中一个添加：去掉渲染后提示开头的 BOS，或把 tokenizer.ggml.add_bos_token 设为 false。
    """


@pitfall(
    "gguf",
    cost="hours",
    kind="construction",
    because="The vocabulary is taken from the tokenizer as training uses it; tokenizer.json is enough.",
    proof=[f"{WORDS}::test_a_sentencepiece_vocabulary_is_read_from_tokenizer_json"],
    errors=[
        r"could not find (?:a )?tokenizer\.model",
        r"tokenizer\.model.{0,80}(?:not found|no such file|is missing)",
        r"(?:file not found|FileNotFoundError|no such file).{0,120}tokenizer\.model",
        r"spm vocab not found",
        r"could not find any of \['?(?:vocab|tokenizer)",
    ],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/3256",
        "https://github.com/ggml-org/llama.cpp/issues/2443",
        "https://github.com/ggml-org/llama.cpp/issues/4120",
    ],
)
def gguf_no_tokenizer_model() -> None:
    """The converter wants tokenizer.model and the trained folder has only tokenizer.json.

    Why: Trainers save the fast tokenizer only; for sentencepiece families llama.cpp reads the original file.

    Fix: Copy tokenizer.model from the base beside the weights; check that tokens added in training are in
    tokenizer.json or added_tokens.json.

    转换器需要 tokenizer.model，而训练目录里只有 tokenizer.json。

    为何：训练器只保存快速分词器；对 sentencepiece 系列，llama.cpp 要读原始文件。

    办法：从基座把 tokenizer.model 复制到权重旁，并确认训练时添加的词元在 tokenizer.json 或 added_tokens.json 中。
    """


@pitfall(
    "gguf",
    cost="minutes",
    errors=[
        r"model has -\d+, but tokenizer",
        r"vocab(?:ulary)?[_ ]size\W{0,6}-1\b",
    ],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/3900",
        "https://github.com/ggml-org/llama.cpp/issues/4045",
    ],
)
def gguf_vocab_minus_one(facts: Facts) -> Iterable[Finding]:
    """The model's config gives a vocabulary of -1 or none at all.

    Why: Meta's params.json says vocab_size -1, "ask the tokenizer". A converter that copies it writes a model that
    llama.cpp and transformers refuse, or whose head has the wrong size.

    Fix: Write the number of rows of the embedding into vocab_size of config.json (32000 for LLaMA 1 and 2).

    模型配置里的词表大小是 -1 或不是正数。

    为何：Meta 的 params.json 写的是 vocab_size -1，意思是“问分词器”。
    照抄它的转换器写出的模型会被 llama.cpp 和 transformers 拒绝，或输出层大小错误。

    办法：把嵌入层的行数写进 config.json 的 vocab_size（LLaMA 1 和 2 是 32000）。
    """
    model = facts.model
    if model is None:
        return
    for key, size in _vocabulary_sizes(model.config):
        if isinstance(size, int) and size <= 0:
            rows = model.embedding_rows
            yield Finding(
                what=f"{key} is {size}" + (f", and the embedding has {rows:,} rows" if rows else ""),
                where=f"{model.folder or model.path}/config.json, field {key}",
                to_do=f"write {rows}" if rows else "write the number of rows of the embedding",
            )


def _vocabulary_sizes(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """vocab_size, also that of the language part of a model with several."""
    if "vocab_size" in config:
        yield "vocab_size", config["vocab_size"]
    for part in ("text_config", "llm_config", "language_config"):
        inner = config.get(part)
        if isinstance(inner, Mapping) and "vocab_size" in inner:
            yield f"{part}.vocab_size", inner["vocab_size"]


@pitfall(
    "gguf",
    cost="launch",
    errors=[r"vocab(?:ulary)? size mismatch \(model has \d+,? but .{0,80}has \d+\)(?!.{0,40}most likely)"],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/6111",
        "https://github.com/hf-lin/ChatMusician/issues/23",
    ],
)
def gguf_vocab_model_32000_tok_32001(facts: Facts) -> Iterable[Finding]:
    """The tokenizer has more tokens than the model has rows.

    Why: A file such as added_tokens.json names a token (often <pad> = 32000) for which the weights were never given a
    row. Training may never meet it, but converters and servers compare the two numbers and refuse the finished model.

    Fix: Remove the unused token from the tokenizer's files, or add the rows to the model and train them.

    分词器的词元比模型的行数多。

    为何：added_tokens.json 之类的文件写了一个词元（常见的是 <pad> = 32000），权重里却没有它的行。
    训练可能从不遇到它，但转换器和推理服务会比较两个数，拒绝训练好的模型。

    办法：从分词器文件里删掉不用的词元，或给模型加行并训练。
    """
    model, tokenizer = facts.model, facts.tokenizer
    if model is None or tokenizer is None or not model.embedding_rows:
        return
    beyond = {name: number for name, number in tokenizer.added_tokens.items() if number >= model.embedding_rows}
    if not beyond or uses_ids_beyond(facts):
        return  # nothing is added, or the run itself would meet these ids, which token-id-beyond-embedding says
    named = ", ".join(f"{name} = {number}" for name, number in sorted(beyond.items(), key=lambda one: one[1])[:4])
    yield Finding(
        what=f"the tokenizer adds {named}{' ...' if len(beyond) > 4 else ''} up to {max(beyond.values())}, and the "
        f"embedding has {model.embedding_rows:,} rows (0 to {model.embedding_rows - 1:,}); training refuses the pair",
        where=f"{tokenizer.source}, added tokens",
        to_do="remove the added tokens from added_tokens.json, tokenizer_config.json and tokenizer.json (nothing can "
        "have learned them), or name the tokenizer that belongs to the weights (model.tokenizer)",
    )


@pitfall(
    "gguf",
    cost="launch",
    errors=[r"vocab(?:ulary)? size mismatch .{0,160}most likely you are missing added_tokens"],
    sources=[
        "https://github.com/lm-sys/FastChat/issues/484",
        "https://github.com/ggml-org/llama.cpp/issues/3442",
    ],
)
def gguf_vocab_model_32001_tok_32000(facts: Facts) -> Iterable[Finding]:
    """The model has rows for added tokens whose names the tokenizer does not know.

    Why: The weights were resized in an earlier training and the tokenizer was taken from the base, so the added token
    (a padding token, a turn end) has a row and no name. It is never trained or produced, and converters refuse it.

    Fix: Take the tokenizer files of the training that resized the weights, added_tokens.json among them.

    模型有新增词元的行，分词器却不知道它们的名字。

    为何：权重在之前的训练中扩过词表，分词器却取自基座，于是新增词元（填充、轮次结尾）有行而无名，
    不会被训练也不会被生成，转换器也会拒绝。

    办法：使用扩过词表的那次训练保存的分词器文件，包括 added_tokens.json。
    """
    model, tokenizer = facts.model, facts.tokenizer
    if model is None or tokenizer is None or not model.embedding_rows or tokenizer.num_ids < FEWEST_TOKENS:
        return
    surplus = model.embedding_rows - tokenizer.num_ids
    # Rows that pad a table to a round number are no tokens; one or a few beyond a round number are.
    if 0 < surplus <= MOST_ADDED and model.embedding_rows % 8 and tokenizer.num_ids % 8 == 0:
        yield Finding(
            what=f"the embedding has {model.embedding_rows:,} rows and the tokenizer {tokenizer.num_ids:,} tokens: "
            f"{surplus} added token{'s' * (surplus > 1)} without a name",
            where=f"{model.path}, and the tokenizer of {tokenizer.source}",
            to_do="name the tokenizer that was saved with these weights (model.tokenizer), or copy its "
            "added_tokens.json and tokenizer_config.json beside them",
            level="warning",
        )


@pitfall(
    "gguf",
    cost="hours",
    kind="construction",
    because="An adapter becomes a GGUF file merged into its base; no adapter files of llama.cpp are written.",
    proof=[f"{FILES}::test_an_adapter_is_merged_while_it_is_read"],
    errors=[
        r"lora-to-gguf",
        r"unexpected name .{1,120}not a lora_A or lora_B tensor",
        r"not a lora_A or lora_B tensor",
    ],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/11554",
        "https://github.com/ggml-org/llama.cpp/issues/3651",
    ],
)
def lora_gguf_with_embeddings() -> None:
    """An adapter that trained embeddings cannot become a GGUF adapter.

    Why: llama.cpp's adapter format holds low-rank pairs only; whole embeddings (modules_to_save, added tokens) do
    not fit in.

    Fix: Merge the adapter into its base, then convert the merged model.

    训练过嵌入层的适配器无法转成 GGUF 适配器。

    为何：llama.cpp 的适配器格式只能放低秩矩阵对，整层嵌入（modules_to_save、新增词元）放不进去。

    办法：先把适配器合并进基座，再转换合并后的模型。
    """

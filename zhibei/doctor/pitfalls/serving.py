"""What goes wrong when a trained model is served. Knows facts and messages, no server."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall


@pitfall(
    "serving",
    cost="minutes",
    kind="construction",
    because="A command of zhibei refuses an option that it does not know or that has no effect.",
    proof=[
        "tests/doctor/test_constructions_serving.py::test_an_option_that_does_nothing_while_talking_is_refused",
        "tests/serve/test_asked.py::test_a_field_that_is_not_known_is_refused",
    ],
    errors=[
        r"--?cutoff[_-]len.{0,80}(?:no effect|ignored)",
    ],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/7771",
    ],
)
def cutoff_ignored_at_serving() -> None:
    """A training option is given to the server, which ignores it.

    Why: A cut of training rows is no limit of a server; requests beyond the context then fail or are cut elsewhere.

    Fix: Set the server's own limit (vLLM --max-model-len, llama-server -c) and shorten the history in the client.

    把训练选项交给服务，服务悄悄忽略了它。

    为何：训练时的截断长度不是服务的上限；超出上下文的请求会失败或在别处被截断。

    办法：设置服务自己的上限（vLLM --max-model-len，llama-server -c），并在客户端裁剪历史。
    """


@pitfall(
    "serving",
    cost="hours",
    kind="construction",
    because="zhibei export writes the template of training into the GGUF file and into a Modelfile, with its stops.",
    proof=[
        "tests/export/test_gguf_words.py::test_a_file_of_ours_prompts_as_training_did",
        "tests/export/test_gguf_words.py::test_the_go_template_writes_what_training_wrote",
        "tests/export/test_gguf_words.py::test_a_modelfile_names_file_stops_and_context",
    ],
    errors=[
        r"ollama.{0,80}(?:template|TEMPLATE).{0,60}(?:missing|not|empty)",
        r"(?:no|missing) chat template.{0,60}(?:gguf|using chatml|falling back|default)",
        r"chat template.{0,60}(?:is not supported|could not be detected).{0,60}(?:chatml|fall)",
    ],
    sources=[
        "https://github.com/ollama/ollama/issues/6821",
        "https://github.com/ollama/ollama/issues/6823",
        "https://github.com/hiyouga/LlamaFactory/issues/6320",
    ],
)
def gguf_runtime_template_missing() -> None:
    """A GGUF file is right, and the program that runs it feeds it raw text.

    Why: Ollama and others look for a template in the file or a Modelfile; when training changed or dropped it, they
    guess or use none, and the answers are gibberish.

    Fix: Write TEMPLATE and stop strings into the Modelfile, the same that training used; compare the rendered
    prompt's ids with those of training.

    GGUF 文件没有问题，运行它的程序却喂了没有模板的原文。

    为何：Ollama 等程序在文件或 Modelfile 里找模板；训练改动或丢掉了它，就会猜测或不用模板，回答成了乱码。

    办法：在 Modelfile 写入与训练相同的 TEMPLATE 和停止串，并比较渲染后提示的编号与训练时是否一致。
    """


@pitfall(
    "serving",
    cost="hours",
    kind="gate",
    proof=[
        "tests/cli/test_chat.py::test_what_no_longer_fits_is_said",
        "tests/serve/test_api.py::test_errors_become_the_clients_own_exceptions",
    ],
    errors=[
        r"input prompt \(\d+ tokens\) is too long",
        r"maximum context length is \d+ tokens",
        r"prompt .{0,60}(?:exceeds|longer than) .{0,40}(?:max_model_len|context|n_ctx|maximum)",
        r"requested tokens \(\d+\) exceed context window",
        r"longer than the maximum model length",
        r"(?:request|prompt|input)\b.{0,60}exceeds? the available context size",
        r"exceed_context_size_error",
        r"decoder prompt.{0,40}is longer than",
    ],
    sources=[
        "https://github.com/vllm-project/vllm/issues/525",
        "https://github.com/vllm-project/vllm/issues/20409",
        "https://github.com/vllm-project/vllm/issues/12165",
    ],
)
def prompt_over_context_returns_empty() -> None:
    """A prompt does not fit into the context, and the answer is empty or an error.

    Why: Prompt and answer share the model's positions. Older servers returned an empty text with a warning in their
    log, which looks like a broken model.

    Fix: Raise the server's limit if the model has the positions (vLLM --max-model-len, llama-server -c), drop the
    oldest turns, or ask for fewer new tokens.

    提示放不进上下文，得到空回答或错误。

    为何：提示与回答共用模型的位置。旧版服务返回空文本、只在日志里警告，看起来像模型坏了。

    办法：若模型有足够位置就提高服务的上限（vLLM --max-model-len，llama-server -c），
    否则去掉最旧的轮次或减少要生成的词元。
    """


@pitfall(
    "serving",
    cost="hours",
    kind="construction",
    because="Training writes its template as chat_template beside the weights, whichever it was.",
    proof=[
        "tests/train/test_sft.py::test_a_run_learns_and_leaves_a_folder_that_transformers_loads",
        "tests/text/test_jinja.py::test_a_family_saved_as_chat_template_keeps_its_learned_characters",
    ],
    errors=[
        r"default chat template is no longer allowed",
        r"you must provide a chat template",
        r"chat template.{0,60}(?:is not|isn't) provided|no chat template (?:was )?(?:provided|defined)",
        r"does not define a chat template",
    ],
    sources=[
        "https://github.com/vllm-project/vllm/issues/7978",
        "https://github.com/vllm-project/vllm/issues/29849",
        "https://github.com/vllm-project/vllm/issues/39279",
    ],
)
def serve_no_chat_template() -> None:
    """A chat endpoint is asked of a model whose tokenizer has no chat template.

    Why: A base model trained with a prompt format of its own is saved without it. Servers refuse, and people then
    paste another family's template, which the model never saw.

    Fix: Give the server the very format of the training (vLLM --chat-template FILE), or save it into
    tokenizer_config.json. zhibei does that in every run.

    向没有对话模板的模型请求聊天接口。

    为何：用自有提示格式训练的基座保存时没有带上格式。服务拒绝后，人们贴上别的系列的模板，而模型从没见过。

    办法：把训练时的格式交给服务（vLLM --chat-template 文件），或写进 tokenizer_config.json。
    zhibei 每次运行都会写入。
    """


@pitfall(
    "serving",
    cost="hours",
    kind="construction",
    because="Each slot of zhibei serve has the whole context, or what --context-tokens names; nothing is divided.",
    proof=["tests/serve/test_api.py::test_every_slot_has_the_whole_context"],
    errors=[
        r"n_ctx_per_seq \(\d+\) < n_ctx_train",
        r"n_ctx_(?:per_)?slot = \d+",
        r"slot .{0,60}(?:context|n_ctx).{0,60}(?:exceed|truncat|full)",
    ],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/11681",
        "https://github.com/ggml-org/llama.cpp/pull/17767",
        "https://github.com/ggml-org/llama.cpp/issues/9016",
    ],
)
def server_context_divided_by_slots() -> None:
    """llama-server divides its context among its slots.

    Why: -c is the total of all parallel slots, so 8192 with four slots leaves 2048 tokens for each conversation;
    longer ones are cut.

    Fix: Ask for context per conversation times slots (-c), fewer slots (-np), or a unified cache; read n_ctx per
    slot in the server's first lines.

    llama-server 把上下文平分给各个槽位。

    为何：-c 是所有并行槽位的总和：8192 配四个槽位时每个对话只有 2048 个词元，更长的会被截断。

    办法：把 -c 设为单个对话所需长度乘槽位数，减少槽位（-np），或用统一缓存；启动时看每个槽位的 n_ctx。
    """


@pitfall(
    "serving",
    cost="hours",
    kind="gate",
    proof=["tests/serve/test_opening.py::test_an_adapter_alone_on_its_base_is_told_to_merge"],
    sources=[
        "https://github.com/huggingface/peft/issues/217",
        "https://github.com/huggingface/peft/issues/957",
        "https://github.com/vllm-project/vllm/issues/3316",
    ],
)
def unmerged_lora_slow_inference() -> None:
    """Answers with an adapter beside its base are slower than those of the merged model.

    Why: Each adapted layer does two more products per token, and kernels for 8-bit bases make it worse.

    Fix: Merge the adapter into the 16-bit base for serving (zhibei merge RUN); keep it apart only while several
    adapters share one base.

    基座加适配器的推理比合并后的模型慢。

    为何：每个带适配器的层每个词元要多做两次乘法，8 位基座的内核更慢。

    办法：推理前把适配器合并进 16 位基座（zhibei merge 运行目录）；只有多个适配器共用基座时才分开。
    """


@pitfall(
    "serving",
    cost="minutes",
    kind="construction",
    because="Our engine takes adapters of any rank, and with --engine vllm the rank is set to that of the largest.",
    proof=["tests/serve/test_vllm.py::test_the_rank_that_vllm_reserves_holds_every_adapter"],
    errors=[
        r"LoRA rank \d+ is greater than max_lora_rank",
        r"max_lora_rank.{0,60}(?:must be one of|exceed|too small)",
        r"rank.{0,20}exceeds? (?:the )?max(?:imum)?[_ ]lora[_ ]rank",
    ],
    sources=[
        "https://github.com/vllm-project/vllm/issues/2847",
        "https://github.com/hiyouga/LlamaFactory/pull/3794",
        "https://github.com/unslothai/unsloth/issues/2097",
    ],
)
def vllm_lora_rank_limit() -> None:
    """The server accepts adapters up to a smaller rank than this one's.

    Why: vLLM reserves memory for rank 16 unless it is told otherwise, and has an upper limit.

    Fix: Start it with --max-lora-rank of at least the adapter's rank, or merge the adapter.

    服务所允许的适配器秩比这个适配器小。

    为何：vLLM 默认只为秩 16 预留内存，且有上限。

    办法：启动时设置不小于适配器秩的 --max-lora-rank，或合并适配器。
    """


@pitfall(
    "serving",
    cost="run",
    kind="gate",
    proof=[
        "tests/serve/test_server_limits.py::test_settings_that_cannot_work_or_leave_the_server_open_are_refused",
        "tests/serve/test_server_limits.py::test_pages_of_the_web_cannot_reach_a_server_on_localhost",
    ],
    sources=[
        "https://github.com/ml-explore/mlx-lm/pull/1687",
        "https://github.com/OpenHands/OpenHands/issues/1219",
    ],
)
def server_open_without_a_key() -> None:
    """A server listens beyond this machine, and nothing asks who is there.

    Why: Servers of models are often started on 0.0.0.0, as examples show it. Everyone on the network then uses the
    GPU and reads what the model was trained on; a page in the browser of someone on the machine can reach even
    127.0.0.1, unless the server looks at where a request comes from.

    Fix: Leave it on 127.0.0.1 and use an SSH tunnel, or set ZHIBEI_API_KEY. zhibei serve refuses another address
    without a key, and requests of web pages that were not named.

    服务对外监听，却不问来者是谁。

    为何：模型服务常照示例用 0.0.0.0 启动，网络上任何人都能用这块 GPU、读出模型学到的数据；
    若服务不看请求来源，本机浏览器里的网页甚至能访问 127.0.0.1。

    办法：只监听 127.0.0.1 并用 SSH 隧道，或设置 ZHIBEI_API_KEY。
    没有密钥时 zhibei serve 拒绝其他地址，也拒绝未经指名的网页的请求。
    """

"""Messages about models, their files and hubs that many faults share. Knows no run."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall

BECAUSE = "It is the library's own refusal, met at once; what can be seen before a run has checks of its own."


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"does not recognize this architecture",
        r"checkpoint you are trying to load has model type",
        r"unrecognized model in ",
        r"unrecognized configuration class",
        r"should have a 'model_type' key in its config\.json",
        r"Model architectures \[.{1,80}\] (?:are|failed)",
        r"model class .{1,80}not (?:supported|found)",
    ],
)
def model_type_unknown() -> None:
    """The installed library does not know this architecture.

    Why: The model is newer than the library, the folder is no model folder (an adapter, a checkpoint of another
    program), or config.json lacks its model_type.

    Fix: pip install -U transformers (or vllm); check that the folder has a config.json with architectures and
    model_type. An adapter folder needs its base first.

    已安装的库不认识这种模型结构。

    为何：模型比库新，或该目录不是模型目录（是适配器或别的程序的检查点），或 config.json 缺少 model_type。

    办法：pip install -U transformers（或 vllm）；确认目录里有带 architectures 与 model_type 的 config.json。
    适配器目录需先加载基座。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"(?:set|pass|setting|passing|option|argument)\b.{0,60}trust_remote_code",
        r"contains custom code which must be executed",
        r"requires you to execute the \w+ file in that repo",
        r"Do you wish to run the custom code",
    ],
)
def remote_code_not_trusted() -> None:
    """The model brings its own Python code and nobody allowed it to run.

    Why: Such a repository would execute its author's code on your machine, so loading stops or waits for an answer
    that no batch job gives.

    Fix: Read the code, pin a revision, then allow it (model.trust_remote_code: true, model.revision). Often a newer
    transformers knows the architecture without it.

    模型自带 Python 代码，而没有人允许它运行。

    为何：这样的仓库会在你的机器上执行作者的代码，所以加载会停下，或等待批处理作业里没有人给出的回答。

    办法：先读代码并固定 revision，再允许（model.trust_remote_code: true、model.revision）。
    新版 transformers 往往已内置该架构。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"\bGatedRepoError\b|access to model .{1,120} is restricted|trying to access a gated repo",
        r"(?:401|403) client error",
        r"invalid (?:username or password|user token)|invalid credentials in authorization header",
        r"you must (?:have access to it|be authenticated)|awaiting a review from the repo authors",
    ],
)
def hub_access_refused() -> None:
    """The hub refuses access to a model or data set.

    Why: Its owner asks for consent, the token is missing on this machine (other nodes, containers), or it may not
    read this repository.

    Fix: Accept the terms on the model's page with the same account, then hf auth login or HF_TOKEN on every node.
    Or name a folder that has been downloaded already.

    模型库拒绝访问该模型或数据集。

    为何：作者要求先同意条款，本机（其他节点、容器）没有令牌，或令牌无权读取。

    办法：用同一账号在模型页面接受条款，然后在每个节点 hf auth login 或设置 HF_TOKEN。也可改用已下载的目录。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"is not a local folder and is not a valid model identifier",
        r"\bHFValidationError\b|repo id must (?:be in the form|use alphanumeric)",
        r"\bRepositoryNotFoundError\b|repository not found for url|404 client error",
        r"does not appear to have (?:a file named|files named|any files)",
        r"incorrect path_or_model_id|is not a local folder or a valid repository name",
        r"error no file named .{1,200} found in directory",
    ],
)
def hub_name_or_path_wrong() -> None:
    """A model was named that is neither a folder here nor a name on the hub.

    Why: A mistyped or relative path is taken for a hub name; or the folder is there and lacks config.json or
    weights because a save did not finish.

    Fix: ls the path on the machine that printed the message; use an absolute path; check the folder with `zhibei
    verify`.

    所写的模型既不是本地目录，也不是模型库里的名字。

    为何：写错的路径或相对路径会被当作模型库名；也可能目录存在，但因保存未完成而缺少 config.json 或权重。

    办法：在报错的机器上 ls 该路径；使用绝对路径；用 `zhibei verify` 检查目录。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"failed to establish a new connection",
        r"(?:temporary failure in name resolution|name or service not known|getaddrinfo failed)",
        r"max retries exceeded with url",
        r"couldn't connect to '?https?://",
        r"\bOfflineModeIsEnabled\b|\bLocalEntryNotFoundError\b|outgoing traffic has been disabled",
        r"(?:Read|Connect)Timeout(?:Error)?\b.{0,200}(?:huggingface|hf\.co|modelscope|http)",
        r"CERTIFICATE_VERIFY_FAILED|\bSSLError\b|\bProxyError\b",
        r"cannot find the requested files in the (?:local|disk) cache",
        r"429 client error",
    ],
)
def hub_out_of_reach() -> None:
    """The model hub cannot be reached from this machine.

    Why: Compute nodes often have no internet, a proxy is missing, or offline mode is on and the files are not in
    the cache.

    Fix: Download on a machine with internet (hf download NAME --local-dir FOLDER) and name the folder; or set
    HTTPS_PROXY, or HF_ENDPOINT for a mirror. HF_HUB_OFFLINE=1 makes it fail at once instead of after minutes.

    本机连不上模型库。

    为何：计算节点往往没有外网、缺少代理，或开了离线模式而缓存里没有文件。

    办法：在有网的机器上下载（hf download 名称 --local-dir 目录）后改用目录；或设置 HTTPS_PROXY，
    用镜像时设置 HF_ENDPOINT。HF_HUB_OFFLINE=1 会立刻失败而不是等几分钟。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"can't load tokenizer for",
        r"couldn't instantiate the backend tokenizer",
        r"did not match any variant of untagged enum",
        r"tokenizer class \w+ does not exist",
        r"error parsing line b'",
        r"could not parse ModelProto from|ParseFromArray\(serialized",
        r"TypeError: not a string",
        r"unable to load vocabulary from file",
    ],
)
def tokenizer_not_loadable() -> None:
    """The tokenizer's files are missing, torn, or newer than the library.

    Why: Trainers that save only weights leave the folder without a tokenizer; tokenizer.json of a newer
    `tokenizers` cannot be read by an older one; sentencepiece files may be Git LFS stand-ins.

    Fix: Copy tokenizer.json, tokenizer_config.json, special_tokens_map.json and tokenizer.model from the run that
    trained it (not from the base, if tokens were added); pip install -U tokenizers transformers sentencepiece
    protobuf.

    分词器文件缺失、残缺，或比库更新。

    为何：只保存权重的训练器会让目录里没有分词器；新版 tokenizers 写的 tokenizer.json 旧版读不了；
    sentencepiece 文件可能只是 Git LFS 占位。

    办法：从训练它的那次运行复制分词器文件（加过词元就不能从基座复制）；
    pip install -U tokenizers transformers sentencepiece protobuf。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"weights only load failed",
        r"WeightsUnpickler error",
        r"serious vulnerability issue in 'torch\.load'",
        r"require users to upgrade torch to at least v?2\.6",
        r"unsupported global: GLOBAL",
    ],
)
def pickled_weights_refused() -> None:
    """A file of pickled weights is refused.

    Why: Pickle files can run any code when they are read. torch 2.6 and newer read only plain tensors from them,
    and transformers asks for that torch.

    Fix: Use a .safetensors version of the model, or convert the file once in a place you trust. weights_only=False
    only for files whose author you trust.

    拒绝读取 pickle 格式的权重。

    为何：pickle 文件在读取时可以执行任意代码。torch 2.6 起只从中读取普通张量，transformers 也要求这一版本。

    办法：使用 .safetensors 版本的模型，或在可信环境里转换一次。只有信任作者时才用 weights_only=False。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"error while deserializing header",
        r"\bSafetensorError\b",
        r"(?:HeaderTooLarge|HeaderTooSmall|InvalidHeader\w*|MetadataIncompleteBuffer|IncompleteBuffer"
        r"|metadata incomplete buffer)",
        r"PytorchStreamReader failed",
        r"invalid load key, ",
        r"git-lfs\.github\.com/spec",
        r"invalid (?:file )?magic\b",
        r"ran out of input",
        r"unexpected EOF, expected \d+ more bytes",
    ],
)
def weights_file_damaged() -> None:
    """A weight file is torn, or is not a weight file at all.

    Why: A download or a save was cut short, the disk was full, or the file is the small text that stands in for it
    in git (Git LFS).

    Fix: Look at its size: about 130 bytes means git lfs pull. Otherwise fetch it again (hf download) or go back to
    the checkpoint before. `zhibei verify FOLDER` checks every file without loading it.

    权重文件残缺，或根本不是权重文件。

    为何：下载或保存中断、磁盘已满，或者它只是 Git LFS 的占位文本。

    办法：看文件大小：约 130 字节说明需要 git lfs pull。否则重新下载（hf download）或退回前一个检查点。
    `zhibei verify 目录` 不加载就能检查每个文件。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"size mismatch for ",
        r"Reinit due to size mismatch",
        r"error\(s\) in loading state_dict",
        r"ignore_mismatched_sizes",
        r"copying a param with shape",
    ],
)
def shapes_of_weights_differ() -> None:
    """Weights and model have other shapes or other names.

    Why: The weights belong to another model, another vocabulary size, another adapter rank, or were saved in shards
    that nobody joined.

    Fix: Compare config.json with the file's header (`zhibei verify FOLDER`). Use the tokenizer and the base that
    the weights were trained with; do not pass ignore_mismatched_sizes: it fills the rest with random numbers.

    权重与模型的形状或名字不符。

    为何：权重属于另一个模型、另一种词表大小、另一个适配器秩，或是未合并的分片。

    办法：把 config.json 与文件头对照（`zhibei verify 目录`）。使用训练时的分词器与基座；
    不要用 ignore_mismatched_sizes，它会用随机数填充其余部分。
    """


@pitfall(
    "messages",
    cost="run",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"were not initialized from the model checkpoint .{0,300}newly initialized:"
        r"(?! ?\[?'?(?:\w+\.)*(?:score|classifier|v_head|summary|qa_outputs|pooler)\b|.{0,300}inv_freq)",
        r"^(?![\w.]*(?:score|classifier|v_head|value_head|reward_head|inv_freq))[\w.{}*, -]+ ?\| ?MISSING ?\|",
    ],
)
def weights_newly_initialised() -> None:
    """Part of the model was not in the weight files and is random now.

    Why: Loading only warns. Names with another prefix (a wrapper, DDP's module., PEFT's base_model.) or a save that
    lost layers leave whole layers random, and the loss starts near ln(vocabulary). A new score or classifier head
    is meant to be random.

    Fix: Compare the names in the file with those the warning lists; strip the prefix or save again from the
    unwrapped model. Heads that you are about to train are the only exception.

    模型有一部分不在权重文件里，现在是随机值。

    为何：加载时只给警告。名字带了别的前缀（包装类、DDP 的 module.、PEFT 的 base_model.）或保存时丢了层，
    整层都会是随机的，损失从 ln(词表) 附近开始。新加的打分头或分类头本该随机。

    办法：把文件里的名字与警告列出的对照；去掉前缀，或从解包后的模型重新保存。只有即将训练的头是例外。
    """

"""Pits of checkpoint files: torn, raced over, sharded, or without what belongs to them. Knows how each is met."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall
from zhibei.doctor.pitfalls.checkpoint import RESUMED_BITS, SAVING, STORE


@pitfall(
    "checkpoint",
    cost="run",
    kind="construction",
    because="rank 0 locks a folder of its own process number, and renames it when every rank's files are sound",
    proof=[
        "tests/train/test_rank_saves.py::test_a_rank_killed_at_any_moment_of_a_save_leaves_the_previous_checkpoint",
        f"{STORE}test_two_processes_saving_at_once_leave_only_sound_checkpoints",
        f"{STORE}test_a_folder_being_filled_by_another_thread_is_neither_cleaned_nor_filled_twice",
    ],
    errors=[
        r"FileNotFoundError.{0,80}tmp-checkpoint-\d+.{0,80}checkpoint-\d+",
        r"\[Errno 39\] Directory not empty.{0,80}checkpoint",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/27925",
        "https://github.com/huggingface/transformers/issues/28015",
        "https://github.com/axolotl-ai-cloud/axolotl/issues/948",
        "https://github.com/allenai/OLMo/issues/894",
    ],
)
def checkpoint_rename_race() -> None:
    """Several processes rename or delete the same half-written checkpoint.

    Why: Each node's first process stages the checkpoint under the same name. On a shared disk the second rename finds
    nothing or a full folder, and the run dies at its first save.

    Fix: There: a version with one writer, and an empty output directory. Here rank 0 alone makes and names the folder;
    the others put files of their own names into it, and it counts when all have read theirs back.

    多个进程对同一个写了一半的检查点改名或删除。

    为何：每个节点的首进程都用同样的名字暂存检查点。在共享磁盘上，第二次改名要么找不到文件，要么目标非空，训练在第一次
    保存时就中断。

    办法：在那里要用只有一个写入者的版本，并清空输出目录；在 zhibei 中只由 rank 0 建立并命名文件夹，其余进程只往里写自己
    的文件，全部读回核对之后检查点才算数。
    """


@pitfall(
    "checkpoint",
    cost="hours",
    kind="construction",
    because="old checkpoints are removed by rank 0 alone, after the new one was read back",
    proof=[
        f"{STORE}test_prune_never_removes_the_newest_sound_checkpoint",
        f"{STORE}test_prune_keeps_the_newest_the_best_and_the_newest_sound",
    ],
    errors=[
        r"FileNotFoundError.{0,200}checkpoint-\d+.{0,200}(rmtree|_rotate_checkpoints)",
        r"_rotate_checkpoints[\s\S]{0,3000}FileNotFoundError",
        r"FileNotFoundError.{0,60}(?:delet|remov|rotat)\w* .{0,60}checkpoint-\d+",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/20988",
        "https://github.com/NVIDIA-NeMo/Automodel/pull/3686",
    ],
)
def checkpoint_rotation_race() -> None:
    """Two nodes delete the same old checkpoint, and the job is marked as failed after its last step.

    Why: With a limit on checkpoints each node's first process removes the oldest one; on a shared disk the second finds
    it gone. In the worst case the best model is what goes.

    Fix: There: rotate on the global first process only. Here rank 0 does it.

    两个节点删除同一个旧检查点，训练在最后一步之后被标记为失败。

    为何：限制检查点数量时，每个节点的首进程都会删最旧的一个；在共享磁盘上第二个进程发现它已不在。最坏时被删的是最好的
    模型。

    办法：在那里只让全局首进程轮换；在 zhibei 中由 rank 0 完成。
    """


@pitfall(
    "checkpoint",
    cost="hours",
    kind="rehearsal",
    by="first loss",
    sources=["https://github.com/Lightning-AI/litgpt/issues/652"],
)
def fsdp_init_random_instead_of_pretrained() -> None:
    """Training starts from random weights although a trained model was named.

    Why: The model is made empty (on the meta device, or on other ranks) and its weights are never filled in. The loss
    of the first step is then ln(vocabulary), 10.4 for 32,000 tokens, and falls as any loss falls.

    Fix: Load before sharding and send the weights to all ranks. The rehearsal compares the first loss with guessing.

    指定了训练好的模型，实际却从随机权重开始训练。

    为何：模型先以空壳建立（在 meta 设备上，或在其他进程上），权重却从未填入。第一步的损失于是等于 ln(词表大小)，3.2 万
    词表约 10.4，之后照样下降。

    办法：先加载再分片，并把权重发送给所有进程。预演会把第一步的损失与瞎猜相比。
    """


@pitfall(
    "checkpoint",
    cost="run",
    kind="rehearsal",
    by="reload",
    errors=[
        r"newly initialized: \[.{0,200}(layernorm|norm|bias)",
    ],
    sources=["https://github.com/huggingface/accelerate/issues/1054"],
)
def fsdp_save_missing_layers() -> None:
    """What was saved lacks layers, and loading it makes new random ones.

    Why: The state of a sharded model was taken on one rank outside of the place that gathers it, so only some
    parameters have a name. The files look complete; loaders put random weights where names are missing.

    Fix: Save through what gathers the whole state. The rehearsal reads its save back in a new process and compares
    every tensor.

    保存的模型缺层，加载时会新建随机权重。

    为何：分片模型的状态在收集它的机制之外、只在一个进程上取得，只有部分参数带有名字。文件看似完整，加载器会在缺名处填上
    随机权重。

    办法：通过能收集完整状态的方式保存。预演会在新进程中读回并逐个比较张量。
    """


@pitfall(
    "checkpoint",
    cost="hours",
    kind="gate",
    proof=[f"{SAVING}test_a_training_state_in_place_of_a_model_is_named"],
    errors=[
        r"HFValidationError.{0,200}(pytorch_model_fsdp|checkpoint)",
        r"\.distcp.{0,120}(?:not found|cannot|error|no such|missing)",
        r"(?:not found|cannot|error|no such|missing).{0,120}\.distcp",
        r"\.metadata.{0,60}(not found|no such file)",
        r"can't find 'adapter_config\.json' at",
    ],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/3573",
        "https://github.com/huggingface/accelerate/issues/2904",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/3073",
    ],
)
def fsdp_sharded_checkpoint_not_loadable() -> None:
    """A folder of shards or of optimiser states is given where a model is expected.

    Why: With sharded state dicts a run leaves *.distcp files, with DeepSpeed a global_step folder; no exporter or
    server reads them, and without their .metadata nobody can.

    Fix: Gather the shards first (accelerate merge-weights, zero_to_fp32.py), and give that folder. Models of zhibei are
    always whole; of a checkpoint in parts, zhibei export RUN --to hf --checkpoint STEP makes one.

    在需要模型的地方给出了分片或优化器状态的文件夹。

    为何：分片状态会留下 *.distcp 文件，DeepSpeed 会留下 global_step 文件夹；导出工具和服务都不认识，没有 .metadata 时更
    无人能读。

    办法：先合并分片（accelerate merge-weights、zero_to_fp32.py），再给出合并后的文件夹。zhibei 的模型总是完整的；分片的
    检查点可用 zhibei export RUN --to hf --checkpoint STEP 合成模型。
    """


@pitfall(
    "checkpoint",
    cost="run",
    kind="rehearsal",
    by="reload",
    errors=[r"pretrained_model\.(model|transformer|lm_head)\."],
    sources=["https://github.com/huggingface/trl/issues/3071"],
)
def ppo_wrapper_prefix_in_checkpoint() -> None:
    """The saved names carry the prefix of a wrapper, so that a plain loader finds none of them.

    Why: The value-head wrapper was saved instead of the model inside. A plain loader reports every name as missing and
    unexpected, and goes on with random weights.

    Fix: Save the inner model. The rehearsal loads its save without any wrapper and compares the logits.

    保存的参数名带有外壳前缀，普通加载器一个也对不上。

    为何：保存的是带价值头的外壳而不是里面的模型。普通加载器把所有名字报为缺失和多余，然后带着随机权重继续。

    办法：保存里层模型。预演会不带外壳地加载并比较 logits。
    """


@pitfall(
    "checkpoint",
    cost="run",
    kind="construction",
    because="every checkpoint holds weights, optimiser and random states; there is no way to save less",
    proof=[f"{SAVING}test_every_checkpoint_holds_the_whole_state_and_no_device", RESUMED_BITS],
    errors=[r"can't find a valid checkpoint at"],
    sources=[
        "https://github.com/huggingface/transformers/issues/27751",
        "https://github.com/huggingface/open-r1/issues/553",
        "https://github.com/sail-sg/oat/issues/41",
    ],
)
def save_only_model_vs_deepspeed_best() -> None:
    """Only weights were saved, and the end of the run (or a resume) asks for the engine's state.

    Why: save_only_model leaves out what DeepSpeed and FSDP need to load their own checkpoint, so keeping the best model
    crashes after the last step, and nothing can be resumed.

    Fix: There: turn one of the two off. Here checkpoints are always whole.

    只保存了权重，训练结束（或恢复）时却要读取引擎状态。

    为何：save_only_model 省去了 DeepSpeed 与 FSDP 读取自己检查点所需的内容，于是加载最好的模型时在最后一步之后崩溃，
    也无法恢复。

    办法：在那里关掉其中一个；在 zhibei 中检查点总是完整的。
    """


@pitfall(
    "checkpoint",
    cost="run",
    kind="rehearsal",
    by="reload",
    errors=[
        r"can't load tokenizer for '[^']*checkpoint-\d+",
        r"can't load tokenizer for",
        r"unable to load vocabulary from file",
    ],
    sources=[
        "https://github.com/tloen/alpaca-lora/issues/248",
        "https://github.com/huggingface/transformers/issues/28670",
        "https://github.com/zjunlp/DeepKE/issues/527",
        "https://github.com/canopyai/Orpheus-TTS/issues/244",
    ],
)
def tokenizer_not_saved_with_model() -> None:
    """The model was saved without the tokenizer it was trained with.

    Why: Added tokens and the pad token exist in the training process only. Later the base's tokenizer is used, whose
    ids differ, and the model seems to have become worse.

    Fix: Save tokenizer and template with the model. The rehearsal loads the written folder alone and compares ids.

    保存模型时没有带上训练所用的分词器。

    为何：新增的符号和填充符只存在于训练进程中。之后用的是基座的分词器，编号不同，模型看起来像是变差了。

    办法：把分词器和模板与模型一起保存。预演会单独加载写出的文件夹并比较编号。
    """


@pitfall(
    "checkpoint",
    cost="run",
    kind="gate",
    proof=[
        "tests/train/test_sft.py::test_resume_takes_the_newest_sound_checkpoint_and_says_so",
        f"{STORE}test_damage_is_named_and_the_older_sound_checkpoint_is_found",
        f"{STORE}test_sixty_kills_leave_a_sound_checkpoint_each_time",
    ],
    errors=[
        r"unexpected pos \d+ vs \d+",
        r"PytorchStreamReader failed (reading|finding)",
        r"(metadata|header)(_| )?(incomplete|too small|too large)",
        r"unexpected EOF, expected \d+ more bytes",
    ],
    sources=[
        "https://github.com/XavierXiao/Dreambooth-Stable-Diffusion/issues/45",
        "https://github.com/pytorch/pytorch/issues/10577",
    ],
)
def truncated_checkpoint_looks_valid() -> None:
    """A checkpoint that was cut off in the middle of its save lies there like a sound one.

    Why: A crash or a full disk leaves half a file under the final name, and older checkpoints may be gone already.
    Resuming reads it, or dies on it.

    Fix: Write aside, read back, rename, and only then remove older ones. Here resume takes the newest checkpoint whose
    hashes hold, and says which ones do not.

    保存中途被截断的检查点看起来与完好的一样。

    为何：崩溃或磁盘写满会在最终名字下留下半个文件，而更早的检查点可能已被删除。恢复时会读到它，或因它而中断。

    办法：先写到别处，读回校验，改名，然后才删旧的。在 zhibei 中，恢复时取哈希成立的最新检查点，并说明哪些不成立。
    """


@pitfall(
    "checkpoint",
    cost="run",
    kind="rehearsal",
    by="save",
    errors=[
        r"size mismatch for .{0,160}copying a param with shape torch\.Size\(\[0\]\)",
        r"stage3_gather_\w+_weights_on_model_save ?= ?false.{0,80}(?:saving|instead|recover)",
    ],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/253",
        "https://github.com/deepspeedai/DeepSpeed/issues/3841",
        "https://github.com/lm-sys/FastChat/issues/508",
        "https://github.com/LianjiaTech/BELLE/issues/351",
        "https://github.com/deepspeedai/DeepSpeed/issues/2413",
    ],
)
def zero3_final_save_tiny() -> None:
    """The finished model is a few hundred kilobytes: placeholders instead of weights.

    Why: Under ZeRO-3 each rank holds a part of every parameter, and a save that does not gather writes tensors of shape
    [0]. The run ends without an error.

    Fix: There: stage3_gather_16bit_weights_on_model_save inside zero_optimization; zero_to_fp32.py recovers a step
    checkpoint. The rehearsal compares the bytes that were written with those that learn.

    训练完成的模型只有几百 KB：里面是占位张量而非权重。

    为何：ZeRO-3 下每个进程只持有参数的一部分，不做收集的保存会写出形状为 [0] 的张量，训练照常结束，没有报错。

    办法：在那里于 zero_optimization 内设 stage3_gather_16bit_weights_on_model_save；已有的步检查点可用
    zero_to_fp32.py 恢复。预演会比较写出的字节数与可训练权重的字节数。
    """

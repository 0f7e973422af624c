"""Pits of FSDP, DeepSpeed and DDP options that zhibei's run file does not have. Knows only why they cannot be met."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall
from zhibei.doctor.pitfalls.distributed import NO_OPTION

SEVERAL_RANKS = "tests/train/test_ranks.py::test_several_ranks_train_what_one_rank_trains"
SEVERAL_RUNS = "tests/train/test_rank_runs.py::test_runs_of_two_ranks_are_those_of_one_and_any_number_goes_on_with_them"
WAITS_AT_STORE = "tests/model/test_meeting.py::test_the_others_wait_for_rank_0_longer_than_any_operation_may_take"


@pitfall(
    "distributed",
    cost="launch",
    kind="watchdog",
    by="dead_gradient",
    errors=[
        r"Expected to have finished reduction in the prior iteration",
        r"(?:marked as|mark a variable) ready (?:twice|only once)",
        r"parameters? (?:that )?(?:were|was) not used in producing loss",
    ],
    sources=[
        "https://github.com/huggingface/accelerate/issues/2017",
        "https://github.com/huggingface/peft/issues/951",
        "https://github.com/huggingface/peft/issues/393",
        "https://github.com/artidoro/qlora/issues/223",
        "https://github.com/tloen/alpaca-lora/issues/575",
    ],
)
def ddp_unused_parameters() -> None:
    """Some trainable weights get no gradient, and torch's DDP waits for it.

    Why: Adapters on layers that are not used, or rows without a target on one rank, leave gradients out. DDP advises
    find_unused_parameters=True, which clashes with reentrant checkpointing; each message suggests the other setting.

    Fix: In other programs adapt only layers that are used, set use_reentrant=False and find_unused_parameters=False.
    zhibei uses no DDP; its watchdog names trainable weights that never get a gradient.

    部分可训练权重得不到梯度，而 torch 的 DDP 在等它。

    为何：适配器加在未使用的层上，或某个进程上的数据行没有目标，都会缺少梯度。DDP 建议
    find_unused_parameters=True，它又与可重入的激活重算冲突；两条报错各自建议对方的设置。

    办法：在其他程序中只给用到的层加适配器，并设 use_reentrant=False 与 find_unused_parameters=False。
    zhibei 不用 DDP；看门狗会指出始终得不到梯度的可训练权重。
    """


@pitfall(
    "distributed",
    cost="hours",
    kind="construction",
    because="The run file has no device_map; a model is loaded onto one device.",
    proof=[NO_OPTION],
    sources=["https://github.com/huggingface/accelerate/issues/1515"],
)
def device_map_auto_naive_pipeline() -> None:
    """The layers of one model are spread over the cards, and one card works at a time.

    Why: device_map="auto" with one process is a pipeline without overlap: with four cards three are idle, and the run
    takes as long as on one.

    Fix: In other programs start one process per card (torchrun) with DDP or FSDP.

    一个模型的各层分散在多张卡上，同一时刻只有一张卡在工作。

    为何：单进程的 device_map="auto" 是没有重叠的流水线：四张卡里有三张空闲，耗时与单卡相同。

    办法：在其他程序中用 torchrun 每张卡启动一个进程，配合 DDP 或 FSDP。
    """


@pitfall(
    "distributed",
    cost="launch",
    kind="construction",
    because="The run file names no layer class; layers are found in the loaded model.",
    proof=[NO_OPTION],
    errors=[r"Could not find the transformer layer class"],
    sources=[
        "https://github.com/tatsu-lab/stanford_alpaca/issues/58",
        "https://github.com/tatsu-lab/stanford_alpaca/issues/94",
        "https://github.com/tatsu-lab/stanford_alpaca/issues/224",
        "https://github.com/tatsu-lab/stanford_alpaca/issues/130",
    ],
)
def fsdp_layer_class_name_case() -> None:
    """FSDP is to wrap a layer class that does not exist under this spelling.

    Why: LLaMADecoderLayer became LlamaDecoderLayer when the model entered transformers. The name is looked up only
    after the whole model was loaded on every rank.

    Fix: In other programs write the entries of model._no_split_modules: LlamaDecoderLayer, Qwen2DecoderLayer, ...

    FSDP 要包装的层类名写法不存在。

    为何：模型并入 transformers 时，LLaMADecoderLayer 改名为 LlamaDecoderLayer。
    而这个名字要到每个进程都加载完整个模型后才去查找。

    办法：在其他程序中填写 model._no_split_modules 的内容：LlamaDecoderLayer、Qwen2DecoderLayer 等。
    """


@pitfall(
    "distributed",
    cost="launch",
    kind="construction",
    because="FSDP 2 divides each weight by itself, so that one unit may hold several dtypes (adapters on a bf16 base).",
    proof=[SEVERAL_RANKS],
    errors=[r"Must flatten tensors with (?:uniform|the same) (?:dtype|`?requires_grad)"],
    sources=[
        "https://github.com/huggingface/trl/issues/1723",
        "https://github.com/axolotl-ai-cloud/axolotl/issues/1494",
        "https://github.com/axolotl-ai-cloud/axolotl/issues/1482",
        "https://github.com/hiyouga/LlamaFactory/issues/3853",
        "https://github.com/hiyouga/LlamaFactory/issues/7993",
        "https://github.com/philschmid/deep-learning-pytorch-huggingface/issues/61",
        "https://github.com/philschmid/deep-learning-pytorch-huggingface/issues/55",
    ],
)
def fsdp_mixed_dtype_flatten() -> None:
    """Weights of several dtypes lie in one FSDP unit.

    Why: FSDP 1 flattens a layer into one tensor. fp32 adapters or norms beside a bf16 base, or a 4-bit base stored as
    uint8, cannot be flattened together.

    Fix: In other programs set bnb_4bit_quant_storage to the compute dtype, autocast_adapter_dtype=False, leave norms
    in the base's dtype, or use FSDP 2, which shards each weight by itself.

    同一个 FSDP 单元内有多种数据类型的权重。

    为何：FSDP 1 把一层展平成一个张量。fp32 的适配器或归一化层与 bf16 基座并存，或 4 位基座以 uint8 存储时，
    无法一起展平。

    办法：在其他程序中把 bnb_4bit_quant_storage 设为计算类型，autocast_adapter_dtype=False，
    归一化层保持基座的类型，或使用逐权重切分的 FSDP 2。
    """


@pitfall(
    "distributed",
    cost="launch",
    kind="construction",
    because="While rank 0 checks, prepares rows and rehearses, the others wait at a store and in no operation, as long "
    "as rank 0 lives. Afterwards every rank reads the rows from the cache.",
    proof=[WAITS_AT_STORE],
    errors=[
        r"Watchdog caught collective operation timeout",
        r"NCCL operations have failed or timed out",
        r"WorkNCCL\(.{0,120}Timeout\(ms\)=\d+\)",
        r"collective operation timeout",
    ],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/2424",
        "https://github.com/hiyouga/LlamaFactory/issues/2902",
    ],
)
def nccl_timeout_rank0_tokenising() -> None:
    """Rank 0 reads and tokenises the data while the others wait, until their patience ends.

    Why: Collectives time out after 10 or 30 minutes. Millions of rows take longer, and the message speaks of an
    all-reduce of one number.

    Fix: In other programs tokenise before the launch, or raise ddp_timeout. In zhibei prepare the rows once with
    zhibei check RUN or zhibei train RUN --dry-run; they are cached under a key of files, tokenizer and template.

    0 号进程在读取并分词数据，其余进程等到耐心耗尽。

    为何：集合通信在 10 或 30 分钟后超时。数百万行数据需要更久，而报错说的是一个只含一个数的 all-reduce。

    办法：在其他程序中先离线分词，或调大 ddp_timeout。在 zhibei 中先运行 zhibei check RUN 或
    zhibei train RUN --dry-run；准备好的数据会按文件、分词器与模板的键值缓存。
    """


@pitfall(
    "distributed",
    cost="minutes",
    kind="construction",
    because="There is no such backend and no such key in the run file.",
    proof=[NO_OPTION],
    errors=[
        r"unsloth.{0,400}(?:8-bit|4-bit).{0,60}different device|(?:8-bit|4-bit).{0,60}different device.{0,200}unsloth",
        r"unsloth.{0,80}(?:multi.?gpu|distributed).{0,40}(?:not (?:yet )?support|unsupported|does not)",
    ],
    sources=[
        "https://github.com/yangjianxin1/Firefly/issues/270",
        "https://github.com/yangjianxin1/Firefly/issues/256",
    ],
)
def unsloth_multi_gpu_torchrun() -> None:
    """A path made for one card is started on several.

    Why: Unsloth loads onto cuda:0 in every rank; all ranks then meet on one card, and a quantised model is on another
    device than its rank expects.

    Fix: In other programs use one card with unsloth, or another backend on several.

    只为单卡设计的路径被用在多卡上。

    为何：Unsloth 在每个进程里都加载到 cuda:0，所有进程挤在同一张卡上，量化模型所在的设备也与进程预期的不同。

    办法：在其他程序中用 unsloth 时只用一张卡，多卡则换别的后端。
    """


@pitfall(
    "distributed",
    cost="hours",
    kind="construction",
    because="Layers are put together on every rank before anything is sampled (model/ranks.py, held_whole).",
    proof=[SEVERAL_RUNS, NO_OPTION],
    errors=[
        r"synced_gpus.{0,80}(?:hang|stuck|must|required|deadlock)",
        r"generat\w+.{0,80}(?:hang|stuck|deadlock).{0,60}(?:zero|fsdp|deepspeed)",
    ],
    sources=[
        "https://github.com/deepspeedai/DeepSpeed/issues/8262",
        "https://github.com/deepspeedai/DeepSpeed/issues/860",
        "https://github.com/deepspeedai/DeepSpeed/issues/3550",
        "https://github.com/deepspeedai/DeepSpeed/issues/4910",
        "https://github.com/deepspeedai/DeepSpeedExamples/pull/636",
        "https://github.com/huggingface/transformers/pull/22242",
    ],
)
def zero3_generate_unsynced_deadlock() -> None:
    """Ranks that share their weights generate answers of different length, and wait for each other for ever.

    Why: Under ZeRO-3 and FSDP every forward pass gathers weights from all ranks. A rank whose answers are finished
    stops asking, and the others hang in the gather.

    Fix: In other programs generate with synced_gpus=True and the same number of batches on each rank, or gather the
    weights first.

    共享权重的各进程生成长度不同的回答，于是互相等待。

    为何：在 ZeRO-3 与 FSDP 下，每次前向计算都要从所有进程收集权重。回答已结束的进程不再请求，
    其余进程就停在收集操作上。

    办法：在其他程序中以 synced_gpus=True 生成，并让每个进程的批数相同，或先收集好权重。
    """


@pitfall(
    "distributed",
    cost="launch",
    kind="construction",
    because="The vocabulary is compared with the embedding before any weight is divided, and nothing is resized.",
    proof=[SEVERAL_RUNS],
    errors=[
        r"shape '?\[-1, 0\]'? is invalid for input of size",
        r"'weight' must be 2-D",
        r"vocab_size\W{1,4}0\b.{0,40}(?:zero|deepspeed)",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/26398",
        "https://github.com/huggingface/transformers/issues/25241",
        "https://github.com/huggingface/transformers/pull/26024",
        "https://github.com/huggingface/transformers/issues/32196",
        "https://github.com/huggingface/transformers/issues/41959",
        "https://github.com/PKU-Alignment/align-anything/issues/26",
    ],
)
def zero3_resize_embedding_size_zero() -> None:
    """The embedding is resized while its rows are spread over ranks.

    Why: Under ZeRO-3 a partitioned weight has size 0, so resizing reads a vocabulary of 0 or makes new rows that
    differ from rank to rank.

    Fix: In other programs resize on one processor before training and save, or do not add tokens.

    嵌入的各行分散在多个进程时调整其大小。

    为何：在 ZeRO-3 下，被切分的权重大小为 0，调整时会读到大小为 0 的词表，或在各进程上生成不同的新行。

    办法：在其他程序中，训练前先在单进程上调整并保存，或不要添加词元。
    """

"""Pits of other trainers' options, and why they do not exist here. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall


@pitfall(
    "config",
    kind="construction",
    cost="minutes",
    because="every evaluation that is the best so far writes a checkpoint itself, whatever save_every says",
    proof=["tests/train/test_sft.py::test_the_best_evaluation_is_the_final_model"],
    errors=[
        r"load_best_model_at_end requires the save and eval(uation)? strategy to match",
        r"load_best_model_at_end requires the saving steps to be a (round )?multiple of the eval(uation)? steps",
    ],
    sources=[
        "https://github.com/huggingface/transformers/pull/12786",
        "https://github.com/hiyouga/LlamaFactory/issues/8133",
        "https://github.com/zjunlp/DeepKE/issues/394",
        "https://github.com/huggingface/transformers/pull/38217",
    ],
)
def best_model_strategy_mismatch() -> None:
    """The best model can only be kept where saving and evaluating happen at the same steps.

    Why: The Trainer loads the best model from its checkpoints, so a checkpoint must exist for every evaluation; with
    other intervals it refuses to start, or compares ratios of steps that rounding made unequal.

    Fix: In the Trainer give both the same strategy and let save_steps be a multiple of eval_steps. Here nothing: the
    best evaluation is saved when it happens.

    只有保存与评估在同一步进行，才能留下最佳模型。

    为何：Trainer 从检查点里取最佳模型，因此每次评估都须有检查点；间隔不一致时它拒绝启动，或因舍入误差比较出不等的步数
    比例。

    办法：在 Trainer 中让两者策略一致，save_steps 为 eval_steps 的整数倍。在 zhibei 中无需任何设置：最佳评估当场保存。
    """


@pitfall(
    "config",
    kind="construction",
    cost="launch",
    because="the run file has one number, global_batch; passes are planned from tokens, and any cut of a step is the "
    "same step",
    proof=[
        "tests/train/test_step.py::test_however_a_step_is_cut_it_is_the_same_step",
        "tests/doctor/test_constructions.py::test_options_of_other_trainers_are_refused_with_what_to_write",
    ],
    errors=[
        r"train_batch_size is not equal to micro_batch_per_gpu \* gradient_acc(umulation)?_steps? \* world_size",
        r"Check batch related parameters\. train_batch_size",
        r"Please correct the following DeepSpeed config values that mismatch TrainingArguments",
    ],
    sources=[
        "https://github.com/deepspeedai/DeepSpeed/issues/3228",
        "https://github.com/bigcode-project/starcoder/issues/41",
        "https://github.com/OpenRLHF/OpenRLHF/issues/346",
        "https://github.com/sahil280114/codealpaca/issues/14",
        "https://github.com/deepspeedai/DeepSpeed/issues/6914",
    ],
)
def ds_batch_triple_inconsistent() -> None:
    """Batch, micro-batch and accumulation are typed three times and do not multiply out.

    Why: DeepSpeed's JSON fixes the batch while the command line gives the other two, and the number of processes
    decides whether the product is right; sometimes it is still counted as one because the JSON is read too early.

    Fix: In DeepSpeed write "auto" for all three. Here give sft.global_batch, the rows of one optimiser step.

    全局批次、微批次与累积步数写了三处，乘起来却不相等。

    为何：DeepSpeed 的 JSON 固定了批次，命令行给出另外两个，乘积对不对取决于进程数；有时 JSON 读得太早，进程数还被当作
    1。

    办法：在 DeepSpeed 中三者都写 "auto"。在 zhibei 中只写 sft.global_batch，即每个优化步的行数。
    """


@pitfall(
    "config",
    kind="construction",
    cost="launch",
    because="a step is a set of rows; it is spread over passes by tokens and needs no divisibility",
    proof=[
        "tests/train/test_step.py::test_however_a_step_is_cut_it_is_the_same_step",
        "tests/doctor/test_constructions.py::test_any_global_batch_is_cut_into_passes_that_hold_each_row_once",
    ],
    errors=[
        r"\d+ != \d+ \* \d+ \* \d+",
        r"batch.{0,20}(must be|is not) divisible by (the )?(number of|num|world|dp|micro)",
    ],
    sources=["https://github.com/OpenRLHF/OpenRLHF/issues/346"],
)
def indivisible_batch_gpu_count() -> None:
    """The batch cannot be divided by micro-batch times number of GPUs.

    Why: Seven cards, or one that was taken out, leave a batch of 256 with a remainder. Programs stop, or round the
    batch silently to another recipe.

    Fix: There: another accumulation, and the effective batch said aloud. Here any number works.

    批次不能被 微批次 × 显卡数 整除。

    为何：七张卡，或少了一张卡，256 的批次就除不尽。程序要么停下，要么悄悄把批次改成另一个数，等于换了配方。

    办法：在别处调整累积步数并写明实际批次。在 zhibei 中任何数都可以。
    """


@pitfall(
    "config",
    kind="construction",
    cost="hours",
    because="length groups are put in random order within each window, so the loss rises and falls at random",
    proof=["tests/doctor/test_constructions.py::test_groups_of_similar_length_come_in_random_order"],
    sources=[
        "https://github.com/tloen/alpaca-lora/issues/246",
        "https://github.com/artidoro/qlora/issues/228",
        "https://github.com/artidoro/qlora/issues/84",
        "https://github.com/tloen/alpaca-lora/issues/414",
        "https://github.com/InternLM/xtuner/issues/817",
        "https://github.com/huggingface/transformers/issues/20810",
    ],
)
def group_by_length_sawtooth() -> None:
    """The loss swings with a period when rows are grouped by length.

    Why: Rows are sorted by length within large groups, longest first, and longer rows have another loss. The curve
    looks like a saw, and people stop or retune a healthy run.

    Fix: Smooth over a whole group, or switch grouping off. Here the groups come in random order; packing needs none.

    按长度分组时损失周期性摆动。

    为何：数据行在大组内按长度从长到短排列，而长行的损失不同，于是曲线呈锯齿状，有人因此中止或重调本来健康的训练。

    办法：按整组平滑，或关闭分组。在 zhibei 中各组顺序随机；packing 则无需分组。
    """


@pitfall(
    "config",
    kind="construction",
    cost="minutes",
    because="buffers that the model computes itself are no weights: their presence or absence in a file changes "
    "nothing, while any missing weight is refused by name",
    proof=[
        "tests/doctor/test_constructions.py::test_a_stored_inv_freq_changes_nothing_and_a_missing_weight_is_refused"
    ],
    errors=[
        r"(not initialized|not used when initializing|newly initialized).{0,200}rotary_emb\.inv_freq",
        r"(?:unexpected|missing).{0,80}(?:inv_freq|masked_bias)",
    ],
    sources=["https://github.com/PaddlePaddle/PaddleNLP/issues/5720"],
)
def ignorable_missing_inv_freq() -> None:
    """A harmless message about rotary_emb.inv_freq looks like a fatal one about weights.

    Why: Old conversions stored tables of positions with the weights; the model computes them itself. The message is the
    same as for weights that are really missing and then random.

    Fix: Ignore it for inv_freq and masked_bias only. Any other name means that files and config do not belong together.

    关于 rotary_emb.inv_freq 的无害提示，看起来像权重缺失的致命错误。

    为何：旧的转换把位置表与权重一起存下，而模型会自行计算。提示的措辞与权重真正缺失（随后被随机初始化）时完全一样。

    办法：仅对 inv_freq 与 masked_bias 可以忽略；其他名字则说明文件与 config 不配套。
    """


@pitfall(
    "config",
    kind="gate",
    cost="launch",
    proof=[
        "tests/config/test_read_faults.py::test_fault_names_place_field_and_remedy",
        "tests/doctor/test_constructions.py::test_options_of_other_trainers_are_refused_with_what_to_write",
    ],
    errors=[
        r"unrecognized arguments?: --",
        r"the following arguments are not (?:used|recognized) by",
        r"Some (keys|specified arguments) are not used by the HfArgumentParser",
    ],
    sources=[
        "https://github.com/binmakeswell/ColossalChat/issues/5",
        "https://github.com/hpcaitech/ColossalAI/issues/4198",
    ],
)
def misspelt_option_in_official_command() -> None:
    """An option is misspelt in the published command itself.

    Why: A spelling such as --accimulation_steps lives on in documents and scripts. A strict parser stops; a tolerant
    one ignores the option, and the run has another batch than the one that was asked for.

    Fix: Use the name the error proposes. Here every unknown key is refused with the nearest right one.

    公开的命令里选项本身就拼错了。

    为何：像 --accimulation_steps 这样的拼写一直留在文档和脚本里。严格的解析器会停下，宽松的会忽略，训练的批次就不是想
    要的。

    办法：改用报错建议的名字。在 zhibei 中任何未知的键都会被拒绝，并给出最接近的正确名字。
    """


@pitfall(
    "config",
    kind="construction",
    cost="run",
    because="the loop stops at the first step whose loss or gradient is not finite, before the update, and writes NaN "
    "as null",
    proof=[
        "tests/train/test_sft.py::test_weights_that_blow_up_stop_the_run_with_step_and_row_ids",
        "tests/train/test_step.py::test_a_step_that_is_not_finite_changes_nothing_and_names_its_rows",
        "tests/store/test_metrics.py::test_nan_and_infinity_are_null_in_the_file_and_floats_when_read",
    ],
    sources=["https://github.com/huggingface/trl/issues/6668", "https://github.com/lm-sys/FastChat/issues/2992"],
)
def nan_loss_logged_as_zero() -> None:
    """The log shows a loss of 0 while the real one is NaN.

    Why: The Trainer replaces non-finite losses in its log by the average of the others (logging_nan_inf_filter), which
    is 0 when all are NaN. A loss of zero looks like success; every saved weight is NaN.

    Fix: In the Trainer set logging_nan_inf_filter=False and stop on NaN. Here the run stops by itself.

    日志里的损失是 0，实际却是 NaN。

    为何：Trainer 在日志中用其余值的平均替换非有限的损失（logging_nan_inf_filter），全部为 NaN 时就成了 0。看起来很成
    功，保存的权重却全是 NaN。

    办法：在 Trainer 中设 logging_nan_inf_filter=False 并在 NaN 时停止。在 zhibei 中训练会自行停止。
    """


@pitfall(
    "config",
    kind="construction",
    cost="hours",
    because="rate, betas, epsilon and decay of each optimiser are given explicitly, and decay goes to matrices only",
    proof=[
        "tests/doctor/test_constructions.py::test_weight_decay_reaches_matrices_and_nothing_else_in_every_optimizer",
        "tests/train/test_step.py::test_the_update_is_adamw_with_clipping_written_out_in_numpy",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/18946",
        "https://github.com/facebookresearch/bitsandbytes/issues/13",
    ],
)
def optimizer_name_semantics_differ() -> None:
    """An optimiser of the same name ignores weight decay, or decays by default.

    Why: Back-ends differ in defaults and in what they read: an "adamw 8-bit" was Adam without decoupled decay, and the
    recorded weight_decay had no effect.

    Fix: Look at the class and the parameter groups of the optimiser that was really made. Here they are set one by one.

    同名的优化器忽略权重衰减，或默认就带衰减。

    为何：各实现的默认值与读取的参数不同：某个 “adamw 8-bit” 其实是没有解耦衰减的 Adam，记录下来的 weight_decay 毫无作
    用。

    办法：查看实际构造出的优化器的类与参数组。在 zhibei 中这些都逐一明确给出。
    """


@pitfall(
    "config",
    kind="explained",
    cost="minutes",
    because="zhibei samples with the model it trains, so there is no second engine whose probabilities need correcting",
    errors=[
        r"tis_imp_ratio_cap.{0,120}(?:required|missing|no effect|AssertionError|log_?probs)",
        r"rollout.{0,40}log_?probs.{0,40}(required|must|missing)",
    ],
    sources=["https://github.com/verl-project/verl/pull/2953"],
)
def rl_tis_without_rollout_logprobs() -> None:
    """Truncated importance sampling is switched on, but the rollout's log-probabilities are not kept.

    Why: The correction compares the probabilities of the engine that sampled with those of the trainer. Without the
    first it either fails or silently does nothing.

    Fix: In verl set calculate_log_probs=True together with tis_imp_ratio_cap.

    打开了截断重要性采样，却没有保存采样时的对数概率。

    为何：该修正要比较采样引擎与训练器的概率；缺了前者，要么报错，要么悄悄不起作用。

    办法：在 verl 中把 calculate_log_probs=True 与 tis_imp_ratio_cap 一起设置。
    """


@pitfall(
    "config",
    cost="hours",
    errors=[
        r"torch\._dynamo hit config\.(recompile_limit|cache_size_limit)",
        r"torch\._dynamo.*(recompil|cache_size_limit)",
    ],
    sources=[
        "https://github.com/allenai/OLMo-core/issues/500",
        "https://github.com/NVIDIA/TensorRT-LLM/issues/6142",
        "https://github.com/Dao-AILab/quack/issues/150",
        "https://github.com/mosaicml/composer/issues/2214",
    ],
)
def torch_compile_recompiles(facts: Facts) -> Iterable[Finding]:
    """Compilation is asked for where every batch has another shape.

    Why: Padded batches differ in rows and in width from step to step. Each new shape may compile again, for minutes,
    until the compiler gives up and runs everything uncompiled. Packed rows have one long sequence and no such trouble.

    Fix: Set data.packing: true, or leave model.compile: auto off for unpacked rows with model.compile: false.

    在每个批次形状都不同的情况下要求编译。

    为何：补齐的批次每步的行数和宽度都不同，每个新形状都可能再编译几分钟，直到编译器放弃、全部按未编译运行。打包的数据
    是一条长序列，没有这个问题。

    办法：设 data.packing: true；数据不打包时设 model.compile: false。
    """
    run = facts.run
    if run.stage == "sft" and run.model.compile is True and not run.data.packing:
        yield Finding(
            what="model.compile: true with data.packing: false: batches of many shapes, each compiled anew",
            where=facts.origin("model.compile"),
            to_do="set data.packing: true, or model.compile: false",
            level="warning",
            changes={"model.compile": False},
            is_safe=True,
        )


@pitfall(
    "config",
    kind="construction",
    cost="run",
    because="only answers are learned unless data.supervise says everything, and the audit shows the learned share",
    proof=[
        "tests/doctor/test_constructions.py::test_only_answers_are_learned_unless_it_is_said",
        "tests/text/test_supervision.py::test_no_learned_character_is_lost_and_no_prompt_token_is_learned",
    ],
    sources=[
        "https://github.com/tloen/alpaca-lora/issues/255",
        "https://github.com/tloen/alpaca-lora/issues/169",
        "https://github.com/tloen/alpaca-lora/issues/499",
        "https://github.com/Lightning-AI/lit-llama/issues/290",
    ],
)
def train_on_inputs_default_true() -> None:
    """The prompt is learned too, because that is the default and its name does not say so.

    Why: Alpaca-LoRA's train_on_inputs is on unless switched off, and sounds as if it were about the field "input". The
    model learns to write instructions and repeats them.

    Fix: Learn answers only. Here that is the default, and the other choice is called `supervise: everything`.

    提示词也被学习了，因为默认如此，而选项名看不出来。

    为何：Alpaca-LoRA 的 train_on_inputs 默认打开，名字又像是在说 “input” 字段。模型于是学会写指令，并在回答时复述。

    办法：只学习回答。在 zhibei 中这是默认，另一种选择叫 `supervise: everything`。
    """

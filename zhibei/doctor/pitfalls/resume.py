"""Pits of going on with a run: what is not restored, restored wrongly, or silently something else. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.checkpoint import RESUMED_BITS, SAVING, STORE


@pitfall(
    "resume",
    cost="hours",
    errors=[r"adapter_name_or_path.{0,80}checkpoint-\d+"],
    sources=["https://github.com/hiyouga/LlamaFactory/issues/5628"],
)
def resume_adapter_path_is_not_resume(facts: Facts) -> Iterable[Finding]:
    """A checkpoint of another run is named as the adapter to start from: that is a new run, not a resumed one.

    Why: Only the weights are taken. The optimiser starts empty, the learning rate warms up again, and the rows begin
    from the first one, so part of them is seen twice.

    Fix: To go on with a run of zhibei: zhibei resume RUN. To begin a new run on purpose, use the finished adapter of
    the other run (runs/NAME/model), or accept this.

    把另一次训练的检查点当作起始适配器：那是新的训练，不是恢复。

    为何：只取了权重。优化器从空状态开始，学习率重新预热，数据从第一行开始，因此一部分会看两遍。

    办法：要继续 zhibei 的训练请用：zhibei resume RUN。若确实要开始新的训练，请使用那次训练完成的适配器
    （runs/NAME/model），或把本项列入 accept。
    """
    adapter = facts.adapter
    if adapter is None or facts.resolved is None or facts.is_resumed:
        return
    if not adapter.training_state:
        return
    key = "lora.adapter" if facts.run.lora.adapter is not None else "model.path"
    yield Finding(
        what=f"{key}: {adapter.path} is a training checkpoint (it holds {', '.join(adapter.training_state)}); only its "
        "weights are taken, optimiser, schedule and place in the data begin anew",
        where=facts.origin(key),
        to_do="resume the other run where it was started, or accept this to begin a new one from these weights",
        level="warning",
    )


@pitfall(
    "resume",
    cost="launch",
    kind="construction",
    because="safetensors hold no device: what is read lands on the host and is copied to where the model is",
    proof=[f"{SAVING}test_every_checkpoint_holds_the_whole_state_and_no_device"],
    errors=[
        r"DistributedDataParallel device_ids and output_device arguments only work with single-device",
        r"got device_ids \[\d+\].{0,80}module parameters \{device\(type='cuda', index=0\)",
    ],
    sources=["https://github.com/tloen/alpaca-lora/issues/369"],
)
def lora_resume_all_ranks_cuda0() -> None:
    """Every process restores its state onto the first card.

    Why: A pickled tensor remembers the card it was saved from. Without map_location all ranks put their copy on cuda:0,
    which overflows, or DDP finds a model spread over cards.

    Fix: There: torch.load(..., map_location="cpu"). Here nothing is unpickled.

    所有进程都把状态恢复到第一张卡上。

    为何：pickle 出来的张量记得它保存时所在的卡。不给 map_location 时，所有进程都放到 cuda:0，要么显存溢出，要么 DDP
    发现模型散在多张卡上。

    办法：在那里用 torch.load(..., map_location="cpu")；在 zhibei 中不使用 pickle。
    """


@pitfall(
    "resume",
    cost="minutes",
    kind="construction",
    because="resuming copies named weights into the model that training made; PEFT's loading functions are not used",
    proof=[RESUMED_BITS],
    errors=[
        r"'NoneType' object has no attribute '(print_trainable_parameters|state_dict|config|is_parallelizable)'",
        r"set_peft_model_state_dict[\s\S]{0,3000}'NoneType' object has no attribute",
    ],
    sources=["https://github.com/tloen/alpaca-lora/pull/322"],
)
def lora_resume_model_none() -> None:
    """The model is None after its adapter was restored.

    Why: set_peft_model_state_dict once returned the model and later no longer did; a script that assigns its result
    throws the model away.

    Fix: Call it without assigning the result.

    恢复适配器之后模型变成了 None。

    为何：set_peft_model_state_dict 早先会返回模型，后来不再返回；把返回值赋给 model 的脚本就把模型丢了。

    办法：调用它时不要赋值。
    """


@pitfall(
    "resume",
    cost="hours",
    kind="construction",
    because="the rate is a function of the step number, and a checkpoint without optimiser state is not sound",
    proof=[RESUMED_BITS, f"{STORE}test_a_group_that_was_removed_together_with_its_line_is_missed"],
    sources=["https://github.com/tloen/alpaca-lora/pull/359"],
)
def lora_resume_scheduler_restarted() -> None:
    """After "resuming" the warm-up begins again.

    Why: The checkpoint held the adapter only. The script loads its weights and silently starts a new schedule and an
    empty optimiser.

    Fix: Give the full state, or begin a new run knowingly. Here a checkpoint without its state is refused.

    “恢复”之后又从头预热。

    为何：检查点里只有适配器。脚本加载了权重，便悄悄开始新的学习率计划和空的优化器。

    办法：提供完整状态，或明确地开始新训练。在 zhibei 中，缺少状态的检查点会被拒绝。
    """


@pitfall(
    "resume",
    cost="run",
    kind="construction",
    because="an adapter that is continued is loaded to learn",
    proof=[f"{SAVING}test_an_adapter_that_is_continued_goes_on_learning"],
    errors=[
        r"trainable params: 0 \|\|",
    ],
    sources=["https://github.com/artidoro/qlora/pull/79"],
)
def lora_resume_trainable_zero() -> None:
    """An adapter was loaded to be continued, and none of its weights learn.

    Why: PEFT loads for inference unless told otherwise. The run then trains nothing, or fails in the first backward
    pass.

    Fix: There: is_trainable=True. Here the run says at its start how many parameters learn.

    加载了适配器要继续训练，却没有任何权重在学习。

    为何：除非另行说明，PEFT 以推理方式加载。于是训练什么也没学，或在第一次反向传播时失败。

    办法：在那里设 is_trainable=True；在 zhibei 中训练开始时会说明有多少参数在学习。
    """


@pitfall(
    "resume",
    cost="hours",
    kind="rehearsal",
    by="resume",
    errors=[r"missing keys.{0,200}lora_[AB]", r"there were missing keys in the checkpoint model loaded"],
    sources=[
        "https://github.com/tloen/alpaca-lora/issues/72",
        "https://github.com/tloen/alpaca-lora/pull/154",
        "https://github.com/huggingface/diffusers/issues/12689",
    ],
)
def lora_resume_weights_not_loaded() -> None:
    """The step counter is restored and the adapter weights are not.

    Why: File or key names do not match, and strict=False hides it. The loss jumps to where it was at the beginning and
    falls again, so few notice.

    Fix: Compare the first loss after resuming with the last one before. The rehearsal does so in a new process, and
    resuming here refuses a checkpoint whose names are not the model's.

    步数恢复了，适配器权重却没有恢复。

    为何：文件名或键名对不上，strict=False 又把它掩盖。损失跳回开始时的水平再慢慢下降，很少有人注意到。

    办法：比较恢复后的第一个损失与之前的最后一个。预演会在新进程中这样做；在 zhibei 中，名字与模型不符的检查点会被拒绝。
    """


@pitfall(
    "resume",
    cost="hours",
    kind="construction",
    because="the rows of a step are a function of seed and step number alone",
    proof=["tests/data/test_batches.py::test_steps_from_the_middle_are_the_rest_of_the_steps", RESUMED_BITS],
    sources=[
        "https://github.com/wyim-pgl/transgenic/issues/59",
        "https://github.com/fw-ai/cookbook/pull/371",
    ],
)
def resume_data_order_differs() -> None:
    """After resuming in the middle of an epoch some rows come twice and others never.

    Why: The order was drawn from a global random state that differs after a restart, so skipping so many batches skips
    others than those that were seen.

    Fix: Draw the order from seed and epoch. Here it is so.

    在一个 epoch 中途恢复后，有些行出现两次，有些从不出现。

    为何：顺序取自全局随机状态，重启后状态不同，跳过同样多的批次跳过的就不是已看过的那些。

    办法：顺序只由种子和 epoch 决定。在 zhibei 中正是如此。
    """


@pitfall(
    "resume",
    cost="minutes",
    kind="gate",
    proof=[f"{SAVING}test_a_finished_run_is_not_resumed"],
    errors=[r"training completed\. do not forget to share your model.{0,200}'train_runtime': 0\.0"],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/9325",
        "https://github.com/hiyouga/LlamaFactory/issues/7476",
        "https://github.com/hiyouga/LlamaFactory/issues/4668",
    ],
)
def resume_finished_run_noop() -> None:
    """A run that has ended is resumed in the hope of more epochs, and ends at once.

    Why: Its step counter is at the end already. Even with a later end the learning rate has fallen to 0.

    Fix: Begin a new run with model.path set to the finished model; it gets a schedule of its own.

    想给已结束的训练追加 epoch 而恢复它，结果立刻结束。

    为何：步数已到终点；即便把终点推后，学习率也已降为 0。

    办法：以完成的模型为 model.path 开始新的训练，它会有自己的学习率计划。
    """


@pitfall(
    "resume",
    cost="hours",
    kind="construction",
    because="any step's rows are found without reading the steps before it, so nothing is skipped or repeated",
    proof=["tests/data/test_batches.py::test_steps_from_the_middle_are_the_rest_of_the_steps"],
    errors=[r"ignore_data_skip.{0,60}(?:repeat|first part|seen (?:twice|again))"],
    sources=[
        "https://github.com/NVIDIA/Model-Optimizer/pull/1611",
        "https://github.com/huggingface/transformers/issues/18649",
    ],
)
def resume_ignore_data_skip_repeats() -> None:
    """Skipping the rows that were seen is switched off because it takes an hour, and they are seen again.

    Why: The data begin from the top; the rest of the epoch is never reached.

    Fix: Use a loader that can start anywhere. Here it can.

    因为跳过已看过的数据要一小时而关掉跳过，于是又看了一遍。

    为何：数据从头开始，这个 epoch 剩下的部分永远不会到达。

    办法：使用可以从任意位置开始的加载器。在 zhibei 中即可如此。
    """


@pitfall(
    "resume",
    cost="hours",
    kind="gate",
    proof=[f"{SAVING}test_adapters_of_another_size_are_refused"],
    errors=[
        r"error\(s\) in loading state_dict for .{0,200}(lora|modules_to_save|embed_tokens)",
        r"loaded state dict contains a parameter group that doesn't match",
        r"loaded state dict has a different number of parameter groups",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/10821",
        "https://github.com/huggingface/peft/issues/1453",
    ],
)
def resume_model_structure_changed() -> None:
    """The model differs from the one that was saved: other targets, rank, tokens or frozen layers.

    Why: Names or shapes no longer match. Loaders that tolerate this leave part of the model new.

    Fix: Put the settings back, or begin a new run. Here both values are named, and nothing is loaded partly.

    模型与保存时不同：目标层、秩、词表或冻结层变了。

    为何：名字或形状对不上。容忍这一点的加载器会让模型的一部分成为新的。

    办法：把设置改回去，或开始新的训练。在 zhibei 中会列出前后两个值，不会只加载一部分。
    """


@pitfall(
    "resume",
    cost="hours",
    kind="gate",
    proof=[f"{SAVING}test_a_setting_changed_since_is_refused_with_both_values"],
    errors=[r"the following arguments do not match the ones in the `?trainer_state\.json`?"],
    sources=[
        "https://github.com/huggingface/transformers/issues/27749",
        "https://github.com/huggingface/transformers/issues/23099",
        "https://github.com/hiyouga/LlamaFactory/issues/7476",
    ],
)
def resume_schedule_horizon_changed() -> None:
    """Epochs, batch or rows changed between save and resume, so the schedule ends somewhere else.

    Why: The place in the schedule is restored and its length is not: the learning rate jumps, or anneals too early or
    never.

    Fix: Keep the length, or begin a new run. Here resume takes no settings, and refuses an edited resolved.yaml.

    保存与恢复之间改了 epoch、批大小或数据，学习率计划的终点随之改变。

    为何：恢复的是在计划中的位置，而不是计划的长度：学习率会跳变，或过早、永不退火。

    办法：保持长度不变，或开始新的训练。在 zhibei 中恢复时不接受设置，改动过的 resolved.yaml 会被拒绝。
    """


@pitfall(
    "resume",
    cost="hours",
    kind="gate",
    proof=[f"{SAVING}test_a_setting_changed_since_is_refused_with_both_values"],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/4595",
        "https://github.com/hiyouga/LlamaFactory/issues/5755",
    ],
)
def resume_changed_lr_ignored() -> None:
    """A learning rate that was changed before resuming has no effect.

    Why: The state of optimiser and scheduler carries the old rate and wins over the new setting, without a word.

    Fix: Begin a new run with the new rate. Here a changed rate is refused with both values.

    恢复前修改的学习率不起作用。

    为何：优化器和调度器的状态带着旧的学习率，会不声不响地盖过新设置。

    办法：用新的学习率开始新的训练。在 zhibei 中改动过的学习率会被拒绝，并列出前后两个值。
    """

"""Messages about tensors: shapes, number formats, devices, gradients that many faults share. Knows no run."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall

BECAUSE = (
    "It arises in other programs' code or versions; zhibei's own loop fixes shapes, formats and devices at one place."
)


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"size of tensor a \(\d+\) must match the size of tensor b",
        r"mat1 and mat2 shapes cannot be multiplied",
        r"sizes of tensors must match except in dimension",
        r"shape '\[.{0,60}\]' is invalid for input of size",
        r"expected input batch_size \(\d+\) to match target batch_size",
        r"The shape of the mask .{0,60} does not match",
    ],
)
def tensor_shapes_disagree() -> None:
    """Two tensors that belong together have other sizes.

    Why: Labels and ids of other lengths, attention masks that were not extended with the prompt, a projection for
    another width, or code written for another version of the library.

    Fix: Read the first frame of your own code in the traceback and print both shapes there. With packed or cut
    rows, ids, labels and mask must be cut alike.

    本应一致的两个张量大小不同。

    为何：可能是标签与编号长度不同、注意力掩码没有随提示延长、投影层宽度不对，或代码为另一版库所写。

    办法：看 traceback 中自己代码的第一帧，打印两者的形状。打包或截断时，编号、标签、掩码必须同样处理。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"mat1 and mat2 must have the same dtype",
        r"expected (?:m1 and m2|query, key,? and value|self and \w+) to have the same dtype",
        r"expected scalar type \w+ but (?:found|got) \w+",
        r"input type \(.{1,60}\) and (?:weight|bias) type \(.{1,60}\) should be the same",
        r"expected .{0,40} but got: ?(?:c10::)?(?:Half|BFloat16|Float)",
        r"attempting to use .{0,40}dtype .{0,60}but",
    ],
)
def number_formats_disagree() -> None:
    """Two tensors have other number formats (fp32, fp16, bf16).

    Why: Norms or heads kept in fp32 meet half-precision inputs outside of autocast, or an adapter was added in
    another format than the base.

    Fix: Run forward and generation inside torch.autocast, or load everything in one format (dtype=torch.bfloat16).
    In zhibei model.precision sets both.

    两个张量的数值格式不同（fp32、fp16、bf16）。

    为何：保持 fp32 的归一化或输出头在 autocast 之外遇到半精度输入，或适配器与基座的格式不同。

    办法：让前向和生成都在 torch.autocast 里运行，或统一格式加载（dtype=torch.bfloat16）。
    zhibei 中由 model.precision 统一设置。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"'\w+' not implemented for '(?:Half|BFloat16|Float8\w*|ComplexHalf)'",
        r"not implemented for '?(?:Half|BFloat16)'?",
    ],
)
def operation_missing_in_half() -> None:
    """An operation does not exist in half precision on this device.

    Why: CPUs lack many fp16 operations, and old GPUs some bf16 ones.

    Fix: Load in fp32 on a CPU (model.precision: fp32), or in bf16 with a recent torch.

    该设备没有这种半精度运算。

    为何：CPU 缺少许多 fp16 运算，旧显卡缺少部分 bf16 运算。

    办法：在 CPU 上用 fp32 加载（model.precision: fp32），或用新版 torch 的 bf16。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"expected all tensors to be on the same device",
        r"found at least two devices",
        r"indices should be either on .{1,20}or on the same device",
        r"cannot be accessed from triton \(cpu tensor",
        r"input .{0,40}is on (?:cpu|cuda).{0,40}but .{0,40}(?:model|expected)",
    ],
)
def tensors_on_several_devices() -> None:
    """Tensors that meet in one operation lie on different devices.

    Why: Inputs were not moved to the model's device, device_map spread the model over cards while the code assumes
    one, or a buffer was made on the CPU.

    Fix: Move inputs to model.device; train without device_map="auto" (one process per GPU instead); add new modules
    before moving the model.

    同一运算里的张量位于不同设备。

    为何：输入没有移到模型所在设备、device_map 把模型分到多卡而代码假定单卡，或某个缓冲区建在 CPU 上。

    办法：把输入移到 model.device；训练时不要用 device_map="auto"（每卡一个进程）；新增模块要在移动模型之前加。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"cannot copy out of meta tensor",
        r"is on (?:the )?meta device|on device meta is not on the expected device",
        r"meta tensors?.{0,60}no data",
    ],
)
def meta_tensor_left() -> None:
    """Part of the model was never filled with weights.

    Why: A model made on the meta device gets its numbers while loading; what the files lack, or what was offloaded,
    stays empty and fails at the first move.

    Fix: Check the list of missing weights above; load without device_map and low_cpu_mem_usage for training, or use
    to_empty and initialise what is truly new.

    模型有一部分从未填入权重。

    为何：在 meta 设备上建立的模型在加载时才得到数值；文件里缺的或被卸载的部分保持为空，第一次移动就会失败。

    办法：看上面缺失权重的列表；训练时不要用 device_map 与 low_cpu_mem_usage，或用 to_empty 并初始化真正新增的部分。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"element 0 of tensors does not require grad",
        r"cannot perform fine-tuning on purely quantized models",
        r"does not have a grad_fn",
        r"optimizer got an empty parameter list",
    ],
)
def nothing_requires_gradient() -> None:
    """The loss depends on nothing that is trained.

    Why: All weights are frozen: adapters were not added or were added in inference mode, or gradient checkpointing
    cut the graph because the inputs of a frozen base need no gradient.

    Fix: Print the trainable parameters before training. With PEFT: is_trainable=True,
    model.enable_input_require_grads() or gradient_checkpointing_kwargs={"use_reentrant": False}.

    损失不依赖任何要训练的参数。

    为何：所有权重都被冻结：没有加适配器或以推理模式加载，或基座冻结时重计算切断了计算图。

    办法：训练前打印可训练参数。PEFT：is_trainable=True，model.enable_input_require_grads()，
    或 gradient_checkpointing_kwargs={"use_reentrant": False}。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"trying to backward through the graph a second time",
        r"modified by an inplace operation",
        r"CheckpointError",
        r"number of (?:saved )?tensors was saved during the original forward",
        r"recomputed values .{0,60}different metadata",
    ],
)
def graph_used_twice() -> None:
    """The backward pass met a graph that was freed, changed or recomputed differently.

    Why: A loss kept over steps, an in-place change of something the gradient needs, or activation checkpointing
    over code whose second run differs (a cache, a changed mask).

    Fix: Detach what is carried over steps; avoid in-place operations on activations; switch the key/value cache off
    in training (use_cache=False) or use_reentrant on.

    反向传播遇到已释放、被修改或重算不一致的计算图。

    为何：可能是跨步保留了损失、原地修改了梯度所需的张量，或重计算的代码第二次运行结果不同（缓存、变化的掩码）。

    办法：跨步使用的张量要 detach；不要原地修改激活；训练时关闭键值缓存（use_cache=False）或换 use_reentrant。
    """


@pitfall(
    "messages",
    cost="hours",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"probability tensor contains either 'inf', 'nan' or element < 0",
        r"probability tensor contains either",
    ],
)
def nan_while_sampling() -> None:
    """The model's outputs are NaN or infinite while it generates.

    Why: fp16 overflows in models that were trained in bf16, the weights are damaged (a diverged run, a wrong
    merge), or padding on the wrong side leaves rows without any visible token.

    Fix: Generate in bf16 or fp32; `zhibei verify FOLDER` looks for NaN in the weights; pad on the left for
    generation.

    生成时模型输出为 NaN 或无穷。

    为何：用 bf16 训练的模型在 fp16 下溢出、权重已损坏（训练发散、合并错误），或填充方向错误使某些行没有可见词元。

    办法：用 bf16 或 fp32 生成；`zhibei verify 目录` 会检查权重中的 NaN；生成时左填充。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"unable to create tensor, you should probably activate (?:truncation|padding)",
        r"expected sequence of length \d+ at dim 1 \(got \d+\)",
        r"stack expects each tensor to be equal size",
        r"excessive nesting",
    ],
)
def rows_not_padded() -> None:
    """Rows of different length were put into one batch without padding.

    Why: The collator pads ids but not the labels, or keeps text columns that it cannot turn into a tensor.

    Fix: Use a collator that pads labels too (with -100), and drop text columns before it.

    长度不同的样本未填充就放进了同一批。

    为何：整理函数只填充了编号而没有填充标签，或保留了无法变成张量的文本列。

    办法：使用也填充标签（-100）的整理函数，并先去掉文本列。
    """


@pitfall(
    "messages",
    cost="run",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"\b(?:train(?:ing)? )?loss (?:is|became|went|goes|turned) (?:to )?(?:nan|inf\w*)\b",
        r"\b(?:nan|inf|non-?finite|infinite) (?:or inf )?(?:loss|grad(?:ient)?s?(?: norm)?)\b"
        r".{0,60}(?:detected|found|encountered|stop|abort|skip|at step)",
        r"(?:detected|found|encountered) (?:a )?(?:nan|inf|non-?finite|infinite)\b.{0,40}(?:loss|grad)",
    ],
)
def loss_not_finite() -> None:
    """The loss or its gradient is no longer a number.

    Why: A rate too high, fp16 beyond its range, a batch in which nothing is learned (a mean over no tokens), or
    damaged weights. Once weights are NaN, every later step and checkpoint is worthless.

    Fix: Go back to the last checkpoint with a finite loss. Then try, in this order: bf16 or fp32 instead of fp16, rows
    without any learned token (`zhibei check` lists them), a tenth of the rate with warm-up and clipping.

    损失或梯度不再是数。

    为何：学习率太高、fp16 溢出、某个批次里没有要学的词元（对空集求平均），或权重已损坏。
    一旦权重变成 NaN，之后的每一步和检查点都没有价值。

    办法：退回损失正常的最后一个检查点。然后依次尝试：用 bf16 或 fp32 代替 fp16；
    检查没有学习词元的样本（`zhibei check` 会列出）；学习率降到十分之一并加预热和梯度裁剪。
    """

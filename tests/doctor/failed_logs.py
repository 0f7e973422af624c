"""Logs of runs that failed, in the words of many programs and versions, each with the pitfalls that may be named.

`LOGS` maps a name to (accepted pitfall ids, program whose noise surrounds it, the failing lines).
"""
# ruff: noqa: E501  lines of logs are as long as programs write them

from __future__ import annotations

NOISE = {
    "transformers": [
        "2026-03-02 09:14:55,120 - INFO - __main__ - Training/evaluation parameters TrainingArguments(",
        "Loading checkpoint shards: 100%|██████████| 3/3 [00:07<00:00,  2.35s/it]",
        "Map (num_proc=8): 100%|██████████| 51760/51760 [00:21<00:00, 2411.52 examples/s]",
        "  0%|          | 0/1170 [00:00<?, ?it/s]",
        "{'loss': 1.4213, 'grad_norm': 0.8312, 'learning_rate': 1.9e-05, 'epoch': 0.01}",
        "{'loss': 1.2874, 'grad_norm': 0.7925, 'learning_rate': 1.8e-05, 'epoch': 0.02}",
    ],
    "deepspeed": [
        "[2026-03-02 09:14:41,006] [INFO] [real_accelerator.py:203:get_accelerator] Setting ds_accelerator to cuda (auto detect)",
        "[2026-03-02 09:14:52,311] [INFO] [comm.py:637:init_distributed] cdb=None",
        "[2026-03-02 09:15:01,870] [INFO] [logging.py:96:log_dist] [Rank 0] DeepSpeed Final Optimizer = DeepSpeedCPUAdam",
        "Using /root/.cache/torch_extensions/py310_cu121 as PyTorch extensions root...",
        "[2026-03-02 09:15:20,002] [INFO] [utils.py:791:see_memory_usage] MA 12.6 GB  Max_MA 12.6 GB  CA 12.61 GB",
    ],
    "torchrun": [
        "W0302 09:14:30.218000 1187 torch/distributed/run.py:792] *****************************************",
        "W0302 09:14:30.218000 1187 torch/distributed/run.py:792] Setting OMP_NUM_THREADS environment variable for each "
        "process to be 1 in default, to avoid your system being overloaded",
        "[rank0]:I0302 09:14:44 init.py:12] rank 0 of 4 ready",
        "[rank1]:I0302 09:14:44 init.py:12] rank 1 of 4 ready",
    ],
    "llama.cpp": [
        "INFO:hf-to-gguf:Loading model: merged",
        "INFO:hf-to-gguf:Set model parameters",
        "INFO:hf-to-gguf:gguf: context length = 4096",
        "INFO:hf-to-gguf:gguf: embedding length = 4096",
    ],
    "vllm": [
        "INFO 03-02 09:14:43 [__init__.py:239] Automatically detected platform cuda.",
        "INFO 03-02 09:14:51 [config.py:717] This model supports multiple tasks: {'generate', 'score'}. Defaulting to 'generate'.",
        "INFO 03-02 09:15:02 [weight_utils.py:265] Using model weights format ['*.safetensors']",
    ],
    "ray": [
        "2026-03-02 09:14:40,551\tINFO worker.py:1843 -- Started a local Ray instance.",
        "(WorkerDict pid=40211) Monkey patch forward in Qwen2 and Llama",
        "(WorkerDict pid=40212) NCCL version 2.21.5+cuda12.4",
    ],
    "plain": [],
}

TRACE = """Traceback (most recent call last):
  File "/workspace/train.py", line 312, in <module>
    main()
  File "/workspace/train.py", line 288, in main
    trainer.train()
"""
ELASTIC = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-03-02_09:18:01
  rank      : 2 (local_rank: 2)
  exitcode  : 1 (pid: 1190)
  error_file: <N/A>
"""
LAUNCH = """Traceback (most recent call last):
  File "/opt/conda/bin/accelerate", line 8, in <module>
    sys.exit(main())
  File "/opt/conda/lib/python3.10/site-packages/accelerate/commands/launch.py", line 979, in launch_command
    simple_launcher(args)
subprocess.CalledProcessError: Command '['/opt/conda/bin/python', 'train.py']' returned non-zero exit status 1.
"""

LOGS: dict[str, tuple[tuple[str, ...], str, str]] = {
    # precision and hardware
    "bf16 on a V100": (
        ("bf16-on-pre-ampere",), "transformers",
        TRACE + "ValueError: Your setup doesn't support bf16/gpu. You need torch>=1.10, using Ampere GPU with cuda>=11.0\n",
    ),
    "bf16, the wording of today": (
        ("bf16-on-pre-ampere",), "torchrun",
        "[rank2]: ValueError: Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want to train the "
        "model on CPU.\n" + ELASTIC,
    ),
    "flash attention on a T4": (
        ("flash-attn-pre-ampere",), "transformers",
        TRACE + "RuntimeError: FlashAttention only supports Ampere GPUs or newer.\n" + LAUNCH,
    ),
    "flash attention in fp32": (
        ("flash-attn-needs-half",), "transformers",
        TRACE + "RuntimeError: FlashAttention only support fp16 and bf16 data type\n",
    ),
    "scaler over fp16 weights": (
        ("fp16-trainable-params-gradscaler",), "transformers",
        TRACE + '  File "torch/amp/grad_scaler.py", line 259, in _unscale_grads_\n'
        '    raise ValueError("Attempting to unscale FP16 gradients.")\nValueError: Attempting to unscale FP16 gradients.\n',
    ),
    "loss scale at its minimum": (
        ("ds-loss-scale-collapse",), "deepspeed",
        "[2026-03-02 09:31:02,115] [INFO] [loss_scaler.py:190:update_scale] [deepspeed] OVERFLOW! Rank 3 Skipping step. "
        "Attempted loss scale: 2, reducing to 1\n" + TRACE
        + "Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.\n",
    ),
    "a card newer than torch": (
        ("gpu-arch-not-in-torch-build",), "transformers",
        "UserWarning: \nNVIDIA GeForce RTX 5080 with CUDA capability sm_120 is not compatible with the current PyTorch "
        "installation.\n" + TRACE + "RuntimeError: CUDA error: no kernel image is available for execution on the device\n",
    ),
    # environment
    "bitsandbytes without its library": (
        ("bnb-cuda-binary-not-found",), "plain",
        "CUDA Setup failed despite GPU being available. Please run the following command to get more information:\n"
        "Required library version not found: libbitsandbytes_cuda118_nocublaslt.so. Maybe you need to compile it from "
        "source?\nCUDA SETUP: Defaulting to libbitsandbytes_cpu.so...\n",
    ),
    "flash_attn of another torch": (
        ("flash-attn-abi-mismatch", "flash-attn-breaks-transformers-import"), "transformers",
        TRACE + "ImportError: /opt/conda/lib/python3.11/site-packages/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: "
        "undefined symbol: _ZN3c104cuda9SetDeviceEi\n",
    ),
    "cpu_adam of another CUDA": (
        ("ext-cuda-toolkit-vs-torch-cuda",), "deepspeed",
        "[extension] Failed to build PyTorch extension because the detected CUDA version (12.4) mismatches the version "
        "that was used to compile PyTorch (11.8). Please make sure to use the same CUDA versions.\n",
    ),
    "gcc too new for nvcc": (
        ("nvcc-unsupported-host-gcc",), "deepspeed",
        "/usr/local/cuda/include/crt/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later "
        "than 11 are not supported!\n" + TRACE + "RuntimeError: Error building extension 'fused_adam'\n",
    ),
    "bus error of a container": (
        ("shm-too-small-exit-7",), "deepspeed",
        "[2026-03-02 09:15:44,318] [INFO] [launch.py:316:sigkill_handler] Killing subprocess 5121\n"
        "[2026-03-02 09:15:45,001] [ERROR] [launch.py:322:sigkill_handler] ['/usr/bin/python3', '-u', 'train.py'] exits "
        "with return code = -7\n",
    ),
    "tokenizer class of an old transformers": (
        ("transformers-too-old-for-llama",), "transformers",
        TRACE + "ValueError: Tokenizer class LlamaTokenizer does not exist or is not currently imported.\n",
    ),
    # memory
    "out of memory, old wording": (
        ("gpu-memory-too-small",), "transformers",
        TRACE + "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 172.00 MiB (GPU 3; 39.56 GiB total "
        "capacity; 37.98 GiB already allocated; 84.56 MiB free; 38.21 GiB reserved in total by PyTorch)\n",
    ),
    "out of memory on one of eight ranks": (
        ("gpu-memory-too-small",), "torchrun",
        "[rank5]: " + TRACE.replace("\n", "\n[rank5]: ") + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate "
        "2.00 GiB. GPU 5 has a total capacity of 79.10 GiB of which 1.03 GiB is free.\n"
        "[rank0]:[E302 09:47:20.114 ProcessGroupNCCL.cpp:629] [Rank 0] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=412, OpType=ALLREDUCE, NumelIn=8388608, NumelOut=8388608, Timeout(ms)=600000) ran for 600012 "
        "milliseconds before timing out.\n"
        "[rank0]: torch.distributed.DistBackendError: NCCL communicator was aborted on rank 0.\n" + ELASTIC,
    ),
    "killed while loading": (
        ("host-oom-exit-9-deepspeed", "fsdp-cpu-ram-n-copies", "host-memory-exhausted"), "deepspeed",
        "Loading checkpoint shards:  67%|██████▋   | 2/3 [00:41<00:20, 20.9s/it]\n"
        "[2026-03-02 09:16:11,910] [ERROR] [launch.py:321:sigkill_handler] ['python', 'sft.py'] exits with return code = -9\n",
    ),
    "oom killer of Slurm": (
        ("host-memory-exhausted", "host-oom-exit-9-deepspeed"), "torchrun",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=481516.0. Some of the step tasks have been OOM Killed.\n"
        "srun: error: node07: task 3: Out Of Memory\n",
    ),
    "out of memory in evaluation": (
        ("eval-logits-accumulate-oom", "eval-batch-larger-than-train"), "transformers",
        TRACE + '  File "transformers/trainer.py", line 3412, in evaluation_loop\n    all_preds.add(logits)\n'
        '  File "transformers/trainer_pt_utils.py", line 140, in nested_concat\n    return torch_pad_and_concatenate(a, b)\n'
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 31.25 GiB.\n",
    ),
    # data, labels, template
    "targets cut away": (
        ("nan-loss-logged-as-zero", "truncation-removes-all-targets", "vicuna-mask-offset-mismatch"), "transformers",
        "{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 1.7e-05, 'epoch': 0.03}\n"
        "{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 1.6e-05, 'epoch': 0.04}\n"
        "{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 1.5e-05, 'epoch': 0.05}\n",
    ),
    "FastChat's mask is off": (
        ("vicuna-mask-offset-mismatch", "llama-wrong-special-ids-decapoda"), "transformers",
        "WARNING: tokenization mismatch: 411 vs. 410. #turn = 3. (ignored)\n"
        "WARNING: tokenization mismatch: 96 vs. 95. #turn = 1. (ignored)\n",
    ),
    "all labels masked": (
        ("response-template-no-match-all-masked", "single-token-marker-not-found"), "transformers",
        TRACE + "ZeroDivisionError: Unsloth: All labels in your dataset are -100. Training losses will be all 0.\n"
        "For example, are you sure you used `train_on_responses_only` correctly?\n",
    ),
    "a chat that begins with the assistant": (
        ("roles-must-alternate",), "vllm",
        TRACE + "jinja2.exceptions.TemplateError: Conversation roles must alternate user/assistant/user/assistant/...\n",
    ),
    "not UTF-8": (
        ("dataset-not-utf8",), "plain",
        TRACE + "UnicodeDecodeError: 'gbk' codec can't decode byte 0xae in position 217: illegal multibyte sequence\n",
    ),
    "id beyond the embedding": (
        ("token-id-beyond-embedding",), "transformers",
        "../aten/src/ATen/native/cuda/Indexing.cu:1290: indexSelectLargeIndex: block: [174,0,0], thread: [31,0,0] "
        "Assertion `srcIndex < srcSelectDimSize` failed.\n" * 5
        + TRACE + "RuntimeError: CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously "
        "reported at some other API call, so the stacktrace below might be incorrect.\n",
    ),
    "columns dropped by the trainer": (
        ("remove-unused-columns-wipes-dataset",), "transformers",
        TRACE + "ValueError: No columns in the dataset match the model's forward method signature: (input_ids, labels). The "
        "following columns have been ignored: [text, source]. Please check the dataset and model.\n",
    ),
    # adapters
    "targets of another family": (
        ("lora-targets-not-in-model",), "transformers",
        TRACE + "ValueError: Target modules {'q_proj', 'v_proj'} not found in the base model. Please check the target "
        "modules and try again.\n",
    ),
    "an adapter of 443 bytes": (
        ("adapter-443-bytes-old-state-dict-patch",), "plain",
        "-rw-r--r-- 1 root root 334 Mar  2 09:14 adapter_config.json\n"
        "-rw-r--r-- 1 root root 443 Mar  2 09:14 adapter_model.bin\n",
    ),
    "an adapter saved under ZeRO-3": (
        ("zero3-lora-empty-adapter",), "transformers",
        TRACE + "RuntimeError: Error(s) in loading state_dict for PeftModelForCausalLM:\n\tsize mismatch for "
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight: copying a param with shape torch.Size([0]) "
        "from checkpoint, the shape in current model is torch.Size([16, 4096]).\n",
    ),
    "nothing is trained after a resume": (
        ("lora-resume-trainable-zero", "nothing-requires-gradient"), "transformers",
        "trainable params: 0 || all params: 6,755,192,832 || trainable%: 0.0000\n" + TRACE
        + "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn\n",
    ),
    "a merge into 8 bit": (
        ("merge-into-8bit-error-old-peft",), "plain",
        TRACE + "ValueError: Cannot merge LORA layers when the model is loaded in 8-bit mode\n",
    ),
    "another base": (
        ("adapter-on-wrong-base", "adapter-does-not-fit-base"), "plain",
        TRACE + "RuntimeError: Error(s) in loading state_dict for PeftModel:\n\tsize mismatch for base_model.model.model."
        "embed_tokens.weight: copying a param with shape torch.Size([49954, 4096]) from checkpoint, the shape in current "
        "model is torch.Size([32000, 4096]).\n",
    ),
}  # fmt: skip

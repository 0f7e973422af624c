"""More logs of failed runs: several processes, checkpoints, resuming, policy learning, export, serving, machines."""
# ruff: noqa: E501  lines of logs are as long as programs write them

from __future__ import annotations

from tests.doctor.failed_logs import ELASTIC, LAUNCH, TRACE

LOGS: dict[str, tuple[tuple[str, ...], str, str]] = {
    # several processes
    "8-bit on another device": (
        ("kbit-device-map-vs-ddp", "unsloth-multi-gpu-torchrun"), "torchrun",
        TRACE + "ValueError: You can't train a model that has been loaded in 8-bit or 4-bit precision on a different device "
        "than the one you're training on. Make sure you loaded the model on the correct device using for example "
        "`device_map={'':torch.cuda.current_device()}`\n" + ELASTIC,
    ),
    "port in use": (
        ("master-port-in-use",), "torchrun",
        "[W302 09:14:33 socket.cpp:436] [c10d] The server socket has failed to bind to [::]:29533 (errno: 98 - Address "
        "already in use).\n[E302 09:14:33 socket.cpp:472] [c10d] The server socket has failed to listen on any local network "
        "address.\n" + TRACE + "torch.distributed.DistNetworkError: The server socket has failed to listen on any local "
        "network address. port: 29533, useIpv6: 0, code: -98, name: EADDRINUSE, message: address already in use\n",
    ),
    "a rank that tokenises": (
        ("nccl-timeout-rank0-tokenising",), "torchrun",
        "[E ProcessGroupNCCL.cpp:828] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, "
        "OpType=BROADCAST, Timeout(ms)=1800000) ran for 1800421 milliseconds before timing out.\n"
        "terminate called after throwing an instance of 'std::runtime_error'\n"
        "  what():  [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=BROADCAST)\n",
    ),
    "unused parameters": (
        ("ddp-unused-parameters",), "torchrun",
        "[rank0]: RuntimeError: Expected to have finished reduction in the prior iteration before starting a new one. This "
        "error indicates that your module has parameters that were not used in producing loss.\n" + ELASTIC,
    ),
    "marked ready twice": (
        ("ddp-unused-parameters",), "torchrun",
        "[rank3]: RuntimeError: Expected to mark a variable ready only once. Parameter at index 127 has been marked as ready "
        "twice. This means that multiple autograd engine hooks have fired for this particular parameter.\n",
    ),
    "mixed dtypes under FSDP": (
        ("fsdp-mixed-dtype-flatten",), "torchrun",
        TRACE + "ValueError: Must flatten tensors with uniform dtype but got torch.float16 and torch.float32\n" + ELASTIC,
    ),
    "layer class of another model": (
        ("fsdp-layer-class-name-case",), "torchrun",
        TRACE + "ValueError: Could not find the transformer layer class LlamaDecoderlayer in the model.\n" + LAUNCH,
    ),
    "a slot that is not there": (
        ("deepspeed-launcher-cuda-visible-devices",), "deepspeed",
        TRACE + "ValueError: No slot '4' specified on host 'localhost'\n",
    ),
    "batch sizes of DeepSpeed": (
        ("ds-batch-triple-inconsistent", "indivisible-batch-gpu-count"), "deepspeed",
        TRACE + "AssertionError: Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
        "gradient_acc_step * world_size 128 != 2 * 8 * 4\n",
    ),
    "no route between nodes": (
        ("multinode-wrong-interface",), "torchrun",
        "node1:118:205 [0] misc/socket.cc:484 NCCL WARN socketStartConnect: Connect to 10.0.3.17<41223> failed : No route to "
        "host\n[rank0]: torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:317, "
        "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5\n" + ELASTIC,
    ),
    # checkpoints and resuming
    "disk full while saving": (
        ("disk-full-at-checkpoint", "no-space-left"), "transformers",
        TRACE + "RuntimeError: [enforce fail at inline_container.cc:626] . unexpected pos 1536 vs 1430\n"
        "During handling of the above exception, another exception occurred:\n\n" + TRACE
        + "OSError: [Errno 28] No space left on device\n",
    ),
    "generation config refused at save": (
        ("generation-config-invalid-at-save",), "transformers",
        TRACE + "ValueError: The generation config instance is invalid -- `.validate()` throws warnings and/or exceptions. Fix "
        "these issues to save the configuration.\n\nThrown during validation:\n[UserWarning('`do_sample` is set to `False`. "
        "However, `temperature` is set to `0.6` -- this flag is only used in sample-based generation modes.')]\n",
    ),
    "a rename race": (
        ("checkpoint-rename-race",), "torchrun",
        "[rank1]: FileNotFoundError: [Errno 2] No such file or directory: '/out/tmp-checkpoint-850' -> '/out/checkpoint-850'\n"
        + ELASTIC,
    ),
    "no tokenizer in the checkpoint": (
        ("tokenizer-not-saved-with-model", "tokenizer-not-loadable"), "plain",
        TRACE + "OSError: Can't load tokenizer for './out/checkpoint-1200'. If you were trying to load it from "
        "'https://huggingface.co/models', make sure you don't have a local directory with the same name.\n",
    ),
    "PEFT returns None": (
        ("lora-resume-model-none",), "plain",
        "    model = set_peft_model_state_dict(model, adapters_weights)\n" + TRACE
        + "AttributeError: 'NoneType' object has no attribute 'print_trainable_parameters'\n",
    ),
    "all ranks resume on one card": (
        ("lora-resume-all-ranks-cuda0",), "torchrun",
        TRACE + "ValueError: DistributedDataParallel device_ids and output_device arguments only work with single-device/"
        "multiple-device GPU modules or CPU modules, but got device_ids [1], output_device 1, and module parameters {device("
        "type='cuda', index=0)}.\n" + ELASTIC,
    ),
    "save and evaluation strategies": (
        ("best-model-strategy-mismatch",), "transformers",
        TRACE + "ValueError: --load_best_model_at_end requires the save and eval strategy to match, but found\n"
        "- Evaluation strategy: IntervalStrategy.NO\n- Save strategy: IntervalStrategy.STEPS\n",
    ),
    "a metric that nobody makes": (
        ("metric-for-best-model-not-produced",), "transformers",
        TRACE + "KeyError: \"The `metric_for_best_model` training argument is set to 'eval_accuracy', which is not found in the "
        "evaluation metrics. The available evaluation metrics are: ['eval_loss', 'epoch'].\"\n",
    ),
    "rope scaling of Llama 3.1": (
        ("rope-scaling-llama31-old-transformers",), "plain",
        TRACE + "ValueError: `rope_scaling` must be a dictionary with with two fields, `type` and `factor`, got {'factor': "
        "32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'rope_type': 'llama3'}\n",
    ),
    # policy learning and preferences
    "negative KL": (
        ("ppo-negative-kl-generation-kwargs",), "plain",
        "UserWarning: KL divergence is starting to become negative: -14.72 - this might be a precursor for failed training. "
        "sometimes this happens because the generation kwargs are not correctly set.\n",
    ),
    "no value head": (
        ("value-head-not-loaded",), "plain",
        "WARNING:root:A <class 'transformers.models.llama.modeling_llama.LlamaForCausalLM'> model is loaded from "
        "'/models/rm', and no v_head weight is found. This IS expected if you are not resuming PPO training.\n",
    ),
    "reference is the policy": (
        ("dpo-ref-deepcopy-shares-peft", "dpo-data-identical-pairs"), "plain",
        "".join(
            f"{{'loss': 0.6931, 'grad_norm': 1.{n}, 'rewards/chosen': 0.0, 'rewards/rejected': 0.0, 'rewards/margins': 0.0, "
            f"'epoch': 0.0{n}}}\n" for n in range(1, 8)
        ),
    ),
    # export and serving
    "vocabulary of a merged model": (
        ("gguf-vocab-model-32000-tok-32001",), "llama.cpp",
        TRACE + "Exception: Vocab size mismatch (model has 32000, but ../merged/tokenizer.model has 32002).\n",
    ),
    "added_tokens.json is missing": (
        ("gguf-vocab-model-32001-tok-32000",), "llama.cpp",
        TRACE + "Exception: Vocab size mismatch (model has 32001, but vicuna/tokenizer.model has 32000).  Most likely you are "
        "missing added_tokens.json (should be in vicuna).\n",
    ),
    "pre-tokenizer not recognised": (
        ("gguf-pretokenizer-hash-unknown",), "llama.cpp",
        "WARNING:hf-to-gguf:** WARNING: The BPE pre-tokenizer was not recognized!\n" + TRACE
        + "NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()\n",
    ),
    "requantising": (
        ("requantise-from-quantised-gguf",), "llama.cpp",
        "llama_model_quantize: failed to quantize: requantizing from type q8_0 is disabled\nmain: failed to quantize model\n",
    ),
    "rank above vLLM's": (
        ("vllm-lora-rank-limit",), "vllm",
        TRACE + "ValueError: LoRA rank 128 is greater than max_lora_rank 16.\n",
    ),
    "a context that is too long": (
        ("prompt-over-context-returns-empty",), "vllm",
        "openai.BadRequestError: Error code: 400 - {'message': \"This model's maximum context length is 8192 tokens. However, "
        "you requested 9731 tokens (9219 in the messages, 512 in the completion).\"}\n",
    ),
    "no chat template": (
        ("serve-no-chat-template", "chat-template-missing"), "vllm",
        "ValueError: As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template "
        "if the tokenizer does not define one.\n",
    ),
    "temperature zero": (
        ("temperature-zero-rejected",), "plain",
        TRACE + "ValueError: `temperature` (=0) has to be a strictly positive float, otherwise your next token scores will be "
        "invalid. If you're looking for greedy decoding strategies, set `do_sample=False`.\n",
    ),
    # machines, packages, files
    "time limit of Slurm": (
        ("job-ended-from-outside",), "torchrun",
        "slurmstepd: error: *** JOB 90210 ON gpu12 CANCELLED AT 2026-03-03T04:00:11 DUE TO TIME LIMIT ***\n",
    ),
    "terminal closed": (
        ("job-ended-from-outside",), "torchrun",
        "W0302 11:02:10 torch/distributed/elastic/agent/server/api.py:719] Received Signals.SIGHUP death signal, shutting down "
        "workers\n" + TRACE + "torch.distributed.elastic.multiprocessing.api.SignalException: Process 812 got signal: 1\n",
    ),
    "an old driver": (
        ("cuda-driver-too-old",), "plain",
        TRACE + "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver\n",
    ),
    "pickle refused by torch": (
        ("pickled-weights-refused",), "plain",
        TRACE + "_pickle.UnpicklingError: Weights only load failed. This file can still be loaded, to do so you have two "
        "options, do those steps only if you trust the source of the checkpoint.\n",
    ),
    "a stand-in of Git LFS": (
        ("weights-file-damaged", "weights-incomplete"), "plain",
        TRACE + "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge\n",
    ),
    "a gated model": (
        ("hub-access-refused",), "transformers",
        TRACE + "huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1-67)\n\nThe above exception was the "
        "direct cause of the following exception:\n\n" + TRACE + "OSError: You are trying to access a gated repo.\n" + LAUNCH,
    ),
    "two devices": (
        ("tensors-on-several-devices",), "transformers",
        TRACE + "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
        "(when checking argument for argument index in method wrapper_CUDA__index_select)\n",
    ),
    "a worker of Ray": (
        ("gpu-memory-too-small",), "ray",
        "(WorkerDict pid=40211) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.25 GiB.\n"
        "ray.exceptions.RayTaskError(OutOfMemoryError): ray::WorkerDict.actor_update() (pid=40211, ip=10.0.0.4)\n"
        "(WorkerDict pid=40212) RuntimeError: NCCL communicator was aborted on rank 1.\n",
    ),
}  # fmt: skip

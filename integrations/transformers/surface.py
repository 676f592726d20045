"""What we touch of transformers, here and in the core, and where; Llama stands for all models."""

from guided_decode.integrations.host_surface import Name, Surface, called, overridden

_ANSWERS = "guided_decode/cli/ablate/answers.py"
_ATTENTION = "guided_decode/forward/attention.py"
_CACHE = "guided_decode/forward/cache_argument.py"
_CONFIG_CHECKS = "guided_decode/checkpoints/config_checks.py"
_ADAPTERS = "guided_decode/checkpoints/adapter_files.py"
_HOW_LOADED = "guided_decode/checkpoints/how_loaded.py"
_LOADING = "guided_decode/checkpoints/trunk.py"
_REPORT = "guided_decode/checkpoints/load_report.py"
_QUANTIZATION = "guided_decode/checkpoints/quantization.py"
_NEXT_LOGITS = "guided_decode/scoring/next_logits.py"
_PACKED = "guided_decode/forward/packed_model.py"
_POOL_SIZE = "guided_decode/forward/pool_size.py"
_GUIDED = "integrations/transformers/custom_generate.py"
_POLICY = "integrations/transformers/policy_match.py"
_PROCESSOR = "integrations/transformers/logits_processor.py"
_SHARDS = "guided_decode/checkpoints/tensor_parallel.py"
_TRUNK = "integrations/transformers/trunk_lookahead.py"
_TRUNK_OPTIONS = "integrations/transformers/trunk_options.py"
_TRUNK_RUN = "integrations/transformers/trunk_run.py"
_ABSTENTION = "integrations/transformers/abstention.py"
_RECORD = "integrations/transformers/value_record.py"
_WITHHELD = "integrations/transformers/withheld.py"

_LLAMA = "transformers.models.llama.modeling_llama"
_LLAMA_CONFIG = "transformers.models.llama.configuration_llama.LlamaConfig"
_PROCESS = "transformers.generation.logits_process"
# 5.24 renamed it.
_THE_CACHE = "cache|past_key_values"

_LOOPS = (
    Name(
        "transformers.GenerationMixin.generate",
        "guided_decode/cli/decoding.py",
        takes=called(by_name=("generation_config", "streamer", "custom_generate"), any_name=True),
    ),
    Name("transformers.GenerationMixin", _WITHHELD),
    Name(
        "transformers.GenerationMixin.generate",
        _WITHHELD,
        takes=called(by_name=("streamer", "assistant_model", "synced_gpus"), any_name=True),
        why="it hands these to no custom loop; they are read in its frame",
    ),
    Name(
        "transformers.GenerationMixin._sample",
        _GUIDED,
        takes=called(
            "input_ids",
            by_name=("logits_processor", "stopping_criteria", "generation_config", "streamer",
                     "synced_gpus"),
            any_name=True,
        ),
        why="called by `custom_generate`, and what that is called like",
    ),
    Name(
        "transformers.GenerationMixin._beam_search",
        _GUIDED,
        takes=called(
            "input_ids",
            by_name=("logits_processor", "stopping_criteria", "generation_config"),
            any_name=True,
        ),
    ),
    Name(
        "transformers.GenerationMixin.prepare_inputs_for_generation",
        _TRUNK_OPTIONS,
        takes=called("input_ids", by_name=(_THE_CACHE,), any_name=True),
        why="under this name `generate` hands its cache on",
    ),
    Name(
        "transformers.GenerationMixin._prepare_cache_for_generation",
        _TRUNK_OPTIONS,
        may_set=("_is_user_defined",),
        why="from 5.17 on it tells a caller's cache from its own",
    ),
    Name("transformers.generation.GenerateDecoderOnlyOutput", _RECORD),
    Name("transformers.generation.GenerateDecoderOnlyOutput", _TRUNK_RUN,
         has=("sequences", "scores", "logits")),
    Name("transformers.generation.GenerateDecoderOnlyOutput", _GUIDED, has=("sequences",)),
    Name("transformers.EosTokenCriteria", _ANSWERS),
    Name("transformers.EosTokenCriteria.__init__", _ANSWERS, takes=called("eos_token_id")),
    Name("transformers.MaxLengthCriteria", _ANSWERS),
    Name("transformers.MaxLengthCriteria.__init__", _ANSWERS, takes=called("max_length")),
    Name("transformers.StoppingCriteria", _ABSTENTION),
    Name("transformers.StoppingCriteria.__call__", _ABSTENTION,
         takes=overridden("input_ids", "scores")),
    Name("transformers.StoppingCriteriaList", _PROCESSOR),
    Name("transformers.StoppingCriteriaList.__call__", _PROCESSOR,
         takes=overridden("input_ids", "scores")),
    Name("transformers.generation.streamers.BaseStreamer", _TRUNK),
    Name("transformers.generation.streamers.BaseStreamer.put", _TRUNK, takes=called("value")),
    Name("transformers.generation.streamers.BaseStreamer.end", _TRUNK, takes=called()),
    Name("transformers.TextStreamer", "guided_decode/cli/generate.py"),
    Name("transformers.TextStreamer.__init__", "guided_decode/cli/generate.py",
         takes=called("tokenizer", by_name=("skip_prompt",), any_name=True)),
)  # fmt: skip

_OPTIONS = (
    Name("transformers.GenerationConfig", _GUIDED,
         has=("eos_token_id", "num_beams", "num_return_sequences", "return_dict_in_generate"),
         may_have=("_eos_token_tensor",)),
    Name("transformers.GenerationConfig", _TRUNK,
         has=("num_return_sequences", "return_dict_in_generate")),
    Name("transformers.GenerationConfig", _POLICY, has=("bos_token_id", "eos_token_id")),
    Name("transformers.GenerationConfig", _TRUNK_RUN,
         has=("do_sample", "output_logits", "output_scores", "_pad_token_tensor")),
    Name(
        "transformers.GenerationConfig",
        _TRUNK_OPTIONS,
        may_have=(
            "cache_implementation", "compile_config", "guidance_scale", "output_attentions",
            "output_hidden_states", "prefill_chunk_size", "token_healing",
        ),
        why="refused",
    ),
    Name("transformers.GenerationConfig.get_generation_mode", _GUIDED, takes=called()),
    Name("transformers.generation.configuration_utils.GenerationMode", _GUIDED,
         has=("BEAM_SAMPLE", "BEAM_SEARCH", "GREEDY_SEARCH", "SAMPLE")),
    Name(
        _PROCESS,
        _GUIDED,
        may_have=(
            "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization", "MinPLogitsWarper",
            "SynthIDTextWatermarkLogitsProcessor", "TemperatureLogitsWarper", "TopHLogitsWarper",
            "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper",
            "WatermarkLogitsProcessor",
        ),
        why="guidance acts before these",
    ),
    Name("transformers.LogitsProcessorList", _GUIDED),
    Name("transformers.LogitsProcessorList.__call__", _TRUNK_RUN,
         takes=called("input_ids", "scores")),
    Name("transformers.LogitsProcessor", _PROCESSOR),
    Name("transformers.LogitsProcessor.__call__", _PROCESSOR,
         takes=overridden("input_ids", "scores")),
)  # fmt: skip

_FORWARD = (
    Name("transformers.AttentionInterface", _ATTENTION),
    Name("transformers.AttentionInterface.register", _ATTENTION, takes=called("key", "value")),
    Name(
        f"{_LLAMA}.eager_attention_forward",
        _ATTENTION,
        takes=called(
            "module", "query", "key", "value", "attention_mask",
            by_name=("scaling", "dropout"), any_name=True,
        ),
        why="the packed attention takes its place",
    ),
    Name(f"{_LLAMA}.LlamaAttention", _ATTENTION, has=("layer_idx",)),
    Name("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS", _ATTENTION,
         why="has no function of our attention's name, so no mask is built"),
    Name(
        f"{_LLAMA}.LlamaModel.forward",
        _PACKED,
        takes=called(by_name=("input_ids", "position_ids", _THE_CACHE, "use_cache"),
                     any_name=True),
        why="hands the packed batch on to the attention",
    ),
    Name(
        f"{_LLAMA}.LlamaForCausalLM.forward",
        _PACKED,
        takes=called(
            by_name=("input_ids", "position_ids", _THE_CACHE, "use_cache", "logits_to_keep"),
            any_name=True,
        ),
    ),
    Name("transformers.modeling_outputs.BaseModelOutputWithPast", _PACKED,
         has=("last_hidden_state",)),
    Name("transformers.modeling_outputs.BaseModelOutputWithPast", _CACHE, has=(_THE_CACHE,)),
    Name("transformers.modeling_outputs.CausalLMOutputWithPast", _NEXT_LOGITS,
         has=("hidden_states", "logits")),
    Name("transformers.Cache.update", _ATTENTION,
         takes=overridden("key_states", "value_states", "layer_idx"),
         why="the slot pool takes its place"),
    Name("transformers.Cache.get_seq_length", _ATTENTION, takes=overridden("layer_idx")),
    Name("transformers.DynamicCache", _POOL_SIZE, has=("layers",)),
    Name("transformers.cache_utils.DynamicLayer", _POOL_SIZE, has=("keys", "values")),
    Name(f"{_LLAMA}.LlamaModel", "guided_decode/forward/final_norm.py", may_have=("norm",)),
    Name(f"{_LLAMA}.LlamaRMSNorm", "guided_decode/forward/final_norm.py",
         may_have=("variance_epsilon", "weight")),
)  # fmt: skip

_MODELS = (
    Name("transformers.PreTrainedModel", _PACKED, has=("config", "device", "dtype")),
    Name("transformers.PreTrainedModel", _LOADING, has=("base_model",)),
    Name("transformers.PreTrainedModel.set_attn_implementation", _PACKED,
         takes=called("attn_implementation")),
    Name("transformers.PreTrainedModel.get_input_embeddings", _PACKED, takes=called()),
    Name("transformers.PreTrainedModel.get_output_embeddings", _NEXT_LOGITS, takes=called()),
    Name(
        "transformers.PreTrainedModel.from_pretrained",
        _REPORT,
        takes=called("pretrained_model_name_or_path",
                     by_name=("config", "revision", "use_safetensors",
                              "ignore_mismatched_sizes"), any_name=True),
    ),
    Name("transformers.utils.loading_report.LoadStateDictInfo", _REPORT,
         has=("missing_keys", "mismatched_keys", "unexpected_keys"),
         why="what output_loading_info gives"),
    Name("transformers.modeling_utils", _REPORT, why="its logger is silenced"),
    Name("transformers.AutoModel", _LOADING),
    Name("transformers.AutoModelForCausalLM", _HOW_LOADED),
    Name("transformers.AutoModelForSequenceClassification", _HOW_LOADED),
    Name("transformers.AutoModelForTokenClassification", _HOW_LOADED),
    Name("transformers.models.auto.modeling_auto.MODEL_MAPPING", _HOW_LOADED),
    Name("transformers.BitsAndBytesConfig", _QUANTIZATION),
    Name("transformers.BitsAndBytesConfig.__init__", _QUANTIZATION,
         takes=called(by_name=("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
                               "bnb_4bit_compute_dtype", "load_in_8bit", "llm_int8_threshold"),
                      any_name=True)),
    Name("transformers.TorchAoConfig", _QUANTIZATION),
    Name("transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING", _QUANTIZATION),
    Name("transformers.utils.quantization_config.QuantizationConfigMixin", _QUANTIZATION),
    Name("transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
         _CONFIG_CHECKS),
    Name("transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
         _ADAPTERS),
    Name("transformers.models.auto.modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
         _ADAPTERS),
)  # fmt: skip

_SHARDED = (
    Name("transformers.distributed.DistributedConfig", _SHARDS, has=("tp_plan",)),
    Name(_LLAMA_CONFIG, _SHARDS, has=("base_model_tp_plan", "num_attention_heads"),
         may_have=("num_key_value_heads",)),
    Name("transformers.distributed.mixin.DistributedMixin",
         "guided_decode/forward/tensor_parallel.py", has=("tp_plan",),
         why="which collectives a forward has"),
    Name("transformers.distributed.tensor_parallel", _LOADING, why="its logger is silenced"),
)  # fmt: skip

_CONFIGS = (
    Name("transformers.AutoConfig", "guided_decode/checkpoints/source.py"),
    Name("transformers.PreTrainedConfig", _CONFIG_CHECKS, has=("is_encoder_decoder", "model_type")),
    Name("transformers.PreTrainedConfig", "guided_decode/checkpoints/source.py",
         has=("architectures", "name_or_path")),
    Name("transformers.PreTrainedConfig", "guided_decode/checkpoints/head.py", has=("num_labels",)),
    Name("transformers.PreTrainedConfig.get_text_config", _PACKED, takes=called()),
    Name(_LLAMA_CONFIG, _PACKED, may_have=("max_position_embeddings",)),
    Name(_LLAMA_CONFIG, _POOL_SIZE, has=("hidden_size",), may_have=("intermediate_size",)),
    Name(_LLAMA_CONFIG, "guided_decode/checkpoints/trunk_head_identity.py",
         has=("num_hidden_layers", "vocab_size")),
    Name(_LLAMA_CONFIG, _CONFIG_CHECKS, may_have=("rope_parameters",)),
    Name(_LLAMA_CONFIG, _POLICY, may_have=("bos_token_id", "eos_token_id", "vocab_size")),
    Name("transformers.modeling_rope_utils.RopeParameters", _CONFIG_CHECKS,
         has=("rope_theta", "rope_type")),
)  # fmt: skip

_FILES = (
    Name("transformers.AutoTokenizer", "guided_decode/checkpoints/tokenizer_files.py"),
    Name("transformers.PreTrainedTokenizerBase", "guided_decode/checkpoints/tokenizer_match.py"),
    Name("transformers.PreTrainedTokenizerBase.get_vocab",
         "guided_decode/checkpoints/tokenizer_match.py", takes=called()),
    Name("transformers.utils.cached_file", "guided_decode/checkpoints/weight_files.py",
         takes=called("path_or_repo_id", "filename", any_name=True)),
    Name("transformers.utils.hub.extract_commit_hash", "guided_decode/cli/run_identity.py",
         takes=called("resolved_file", "commit_hash")),
    Name("transformers.utils.hub.cached_files", "guided_decode/checkpoints/weight_files.py",
         takes=called("path_or_repo_id", "filenames",
                      by_name=("revision", "_raise_exceptions_for_missing_entries")),
         why="gets what cached_file is given"),
    Name("transformers.utils.logging", "guided_decode/cli/checkpoints.py"),
    Name("transformers.utils.logging.set_verbosity_error", "guided_decode/cli/checkpoints.py",
         takes=called()),
    Name("transformers.utils.logging.disable_progress_bar", "guided_decode/cli/checkpoints.py",
         takes=called()),
)  # fmt: skip

SURFACE = Surface(
    package="transformers",
    distributions=("transformers",),
    read_in="5.19.0",
    holds_in=("5.16.1", "5.24.0"),
    names=(*_LOOPS, *_OPTIONS, *_FORWARD, *_MODELS, *_SHARDED, *_CONFIGS, *_FILES),
)

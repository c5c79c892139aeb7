"""What vLLM must have for the engine to work, beside what our imports say.

A target is `package.module:Class.name`; `a|b:name` is the name in either module, for what has moved. Parts of the same
class stand together. To take up a version of vLLM: docs/reference/vllm.md.
"""

_CLI = "vllm.entrypoints.common.cli_args|vllm.entrypoints.launchers.cli_args"
_CHAT = "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest"
_COMPLETION = "vllm.entrypoints.openai.completion.protocol:CompletionRequest"
_RESPONSES = "vllm.entrypoints.openai.responses.protocol:ResponsesRequest"
_MOE = "vllm.model_executor.layers.fused_moe"
_EXPERTS = (
    "output=, hidden_states=, w1=, w2=, topk_weights=, topk_ids=, activation=, global_num_experts=, expert_map=,"
    " a1q_scale=, a2_scale=, workspace13=, workspace2=, expert_tokens_meta=, apply_router_weight_on_input="
)
_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_V2_SCORES = "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker"

WRAPPED = {
    "detokenizing._decode_next": ["vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.decode_next"],
    "detokenizing._init": ["vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.__init__"],
    "fresh_blocks.get_kv_cache_configs": ["vllm.v1.engine.core:get_kv_cache_configs"],
    "limits._check_length": ["vllm.v1.engine.input_processor:InputProcessor._validate_prompt_len"],
    "limits._max_tokens": ["vllm.entrypoints.serve.utils.api_utils:get_max_tokens"],
    "masked_experts.keep_weights": [f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading"],
    "metering.meter.generate": ["vllm.v1.engine.async_llm:AsyncLLM.generate"],
    "plugin._add_request": ["vllm.v1.engine.core:EngineCore.add_request"],
    "plugin._block_keys": [
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
    ],
    "plugin._create_engine_config": ["vllm.engine.arg_utils:EngineArgs.create_engine_config"],
    "plugin._init_device": ["vllm.v1.worker.worker_base:WorkerWrapperBase.init_device"],
    "plugin._init_front_end": ["vllm.v1.engine.input_processor:InputProcessor.__init__"],
    "plugin._prepare_v2.resolve": ["vllm.v1.worker.gpu.model_states:resolve_model_state_cls"],
    "plugin._preprocess_add_request": ["vllm.v1.engine.core:EngineCore.preprocess_add_request"],
    "plugin._process_inputs": ["vllm.v1.engine.input_processor:InputProcessor.process_inputs"],
    "plugin._refuse_masked_inputs": ["vllm.v1.engine.input_processor:InputProcessor.process_inputs"],
    "plugin._to_beam_search_params": [f"{_CHAT}.to_beam_search_params", f"{_COMPLETION}.to_beam_search_params"],
    "runner_v1.MaskedRunner.dummy_run": [f"{_V1}._dummy_run"],
    "runner_v1.MaskedRunner.load_model": [
        f"{_V1}.load_model",
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
    ],
    "runner_v1.MaskedRunner.prepare_inputs": [f"{_V1}._prepare_inputs"],
    "runner_v1.MaskedRunner.prompt_logprobs": [f"{_V1}._get_prompt_logprobs_dict"],
    "runner_v2.add_scored": [f"{_V2_SCORES}.add_request"],
    "runner_v2.compute_prompt_logprobs": [f"{_V2_SCORES}.compute_prompt_logprobs"],
    "runner_v2.remove_scored": [f"{_V2_SCORES}.remove_request"],
    "scoring.get_computed_blocks": ["vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks"],
    "vllm_routes._beam_search": ["vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search"],
    "vllm_routes._init_entrypoints_middleware": [
        "vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware",
        "vllm.entrypoints.launchers.app:init_entrypoints_middleware",
    ],
    "vllm_routes._read_batch_request": ["vllm.entrypoints.launchers.run_batch:BatchRequestInput.model_validate_json"],
    "vllm_routes._validate_prompt_dict": ["vllm.renderers.inputs.preprocess:_validate_prompt_dict"],
    "vocabulary.validate_token_ids": ["vllm.renderers.base:BaseRenderer.validate_token_ids"],
}
"""By our function, what it replaces: it takes what vLLM's takes."""

MIXED_IN = {
    "fresh_blocks.ZeroedKVCacheConfig": "vllm.v1.kv_cache_interface:KVCacheConfig",
    "runner_v2.MaskedModelState": "vllm.v1.worker.gpu.model_states.interface:ModelState",
}
"""By our class, vLLM's that it is put before: each of its methods overrides one there, and takes what that takes."""

ADDED = {
    "EngineCore, activations.TAKE_METHOD": "vllm.v1.engine.core:EngineCore.crane_take_activations",
    "EngineCore, live_masks.CHANGE_METHOD": "vllm.v1.engine.core:EngineCore.crane_change_mask",
    "EngineCore, live_masks.FORGET_METHOD": "vllm.v1.engine.core:EngineCore.crane_forget_masks",
    "WorkerWrapperBase, activations.TAKE_METHOD": "vllm.v1.worker.worker_base:WorkerWrapperBase.crane_take_activations",
    "WorkerWrapperBase, live_masks.CHANGE_METHOD": "vllm.v1.worker.worker_base:WorkerWrapperBase.crane_change_mask",
    "WorkerWrapperBase, live_masks.FORGET_METHOD": "vllm.v1.worker.worker_base:WorkerWrapperBase.crane_forget_masks",
}
"""By our call of `setattr`, the name that it adds, which must be free."""

CALLED = {
    f"{_CLI}:FrontendArgs.add_cli_args": "parser",
    f"{_CLI}:validate_parsed_serve_args": "args",
    "vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args": "parser",
    "vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args": "args",
    "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config": "",
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": "parser",
    "vllm.engine.arg_utils:EngineArgs.from_cli_args": "args",
    "vllm.entrypoints.generate.api_router:register_generate_api_routers": "app",
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state": "engine_client, state, args, supported_tasks",
    "vllm.entrypoints.llm:LLM.from_engine_args": "engine_args",
    "vllm.entrypoints.llm:LLM.generate": "prompts, sampling_params, use_tqdm=",
    "vllm.entrypoints.llm:LLM.get_tokenizer": "",
    "vllm.entrypoints.openai.models.api_router:attach_router": "app",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name": "lora_request",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models": "",
    "vllm.entrypoints.scale_out.factories:register_scale_out_api_routers": "app, supported_tasks",
    "vllm.entrypoints.serve.exception_handling.register:init_exception_handler": "app",
    "vllm.entrypoints.serve.utils.api_utils:get_max_tokens": (
        "max_model_len, max_tokens, input_length, default_sampling_params, truncate_prompt_tokens="
    ),
    "vllm.entrypoints.serve.exception_handling.handlers.http:http_exception_handler": "req, exc",
    "vllm.entrypoints.serve.tokenize.api_router:attach_router": "app",
    "vllm.exceptions:VLLMValidationError.__init__": "message, parameter=",
    "vllm.inputs:tokens_input": "prompt_token_ids",
    "vllm.logger:init_logger": "name",
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.__init__": "load_config",
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights": (
        "model_name_or_path, subfolder, revision, fall_back_to_pt, allow_patterns_overrides"
    ),
    f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod.forward_native": (
        "layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input"
    ),
    f"{_MOE}.experts.triton_moe:TritonExperts.apply": _EXPERTS,
    f"{_MOE}.router.fused_moe_router:FusedMoERouter.select_experts": "hidden_states, router_logits",
    f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.apply": _EXPERTS,
    "vllm.platforms.interface:Platform.get_device_name": "",
    "vllm.platforms.interface:Platform.is_cuda_alike": "",
    "vllm.reasoning:ReasoningParserManager.import_reasoning_parser": "plugin_path",
    "vllm.tool_parsers:ToolParserManager.import_tool_parser": "plugin_path",
    "vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config": "vllm_config, disable_log_stats=, enable_log_requests=",
    "vllm.v1.engine.async_llm:AsyncLLM.generate": "prompt, sampling_params, request_id, data_parallel_rank=",
    "vllm.v1.engine.async_llm:AsyncLLM.get_tokenizer": "",
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": "",
    "vllm.v1.engine.core:EngineCore.collective_rpc": "method, args=",
    "vllm.v1.engine.core:EngineCoreProc._send_finish_outputs_to_client": "req_ids, client_index, finish_reason",
    "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async": "method, *",
    "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async": "method, *",
    "vllm.v1.engine.core_client:DPLBAsyncMPClient.call_utility_async": "method, *",
    "vllm.v1.engine.core_client:EngineCoreClient.shutdown": "",
    "vllm.v1.metrics.prometheus:get_prometheus_registry": "",
}
"""What we call, with the arguments that we pass: by position, by name (`name=`), and any number of them (`*`)."""

READ = {
    "vllm": "envs",
    "vllm.envs": "VLLM_USE_MODELSCOPE",
    _CHAT: "vllm_xargs",
    _COMPLETION: "vllm_xargs",
    _RESPONSES: "vllm_xargs",
    _V1: "input_batch requests discard_request_mask model vllm_config load_model _prepare_inputs _dummy_run"
    " _zero_block_ids device kv_caches kv_cache_config num_prompt_logprobs query_start_loc _get_prompt_logprobs_dict"
    " input_ids get_model",
    _V2: "vllm_config model_state prompt_logprobs_worker",
    _V2_SCORES: "uses_prompt_logprobs",
    "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration": "compute_logits",
    f"{_CLI}:FrontendArgs": "lora_modules tokens_only enable_server_load_tracking enable_tokenizer_info_endpoint",
    f"{_CLI}:BaseFrontendArgs": "lora_modules tool_parser_plugin",
    "vllm.config:CacheConfig": "kv_sharing_fast_prefill enable_prefix_caching block_size kv_cache_size_tokens",
    "vllm.config:CompilationConfig": "cudagraph_capture_sizes mode",
    "vllm.config:CompilationMode": "NONE",
    "vllm.config:DeviceConfig": "device_type",
    "vllm.config:LoadConfig": "load_format",
    "vllm.config.kernel:KernelConfig": "moe_backend",
    "vllm.config:ModelConfig": "model dtype max_model_len runner_type hf_config hf_text_config get_vocab_size"
    " try_get_generation_config hf_config_path tokenizer_revision enable_sleep_mode",
    "vllm.config:ParallelConfig": "use_ubatching prefill_context_parallel_size tensor_parallel_size data_parallel_size",
    "vllm.config:SchedulerConfig": "max_num_seqs max_num_batched_tokens",
    "vllm.config:VllmConfig": "model_config cache_config parallel_config scheduler_config compilation_config"
    " device_config load_config speculative_config lora_config kv_transfer_config weight_transfer_config"
    " additional_config use_v2_model_runner kernel_config",
    "vllm.engine.arg_utils:EngineArgs": "language_model_only",
    "vllm.engine.arg_utils:AsyncEngineArgs": "model tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code"
    " served_model_name disable_log_stats enable_log_requests reasoning_parser_plugin",
    "vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest": "vllm_xargs",
    "vllm.entrypoints.generate.beam_search.offline": "BeamSearchOfflineMixin",
    "vllm.entrypoints.launchers.run_batch": "BatchRequestInput",
    "vllm.entrypoints.llm:LLM": "llm_engine",
    "vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateRequest": "sampling_params",
    "vllm.entrypoints.serve.engine.protocol:ModelCard": "id root parent max_model_len permission",
    "vllm.entrypoints.serve.engine.protocol:ModelList": "data",
    "vllm.logprobs:Logprob": "logprob rank decoded_token",
    f"{_MOE}.activation:MoEActivation": "SILU GELU GELU_TANH SWIGLUOAI",
    f"{_MOE}.config:FusedMoEConfig": "num_experts experts_per_token intermediate_size in_dtype"
    " intermediate_size_per_partition activation moe_parallel_config router_logits_dtype",
    f"{_MOE}.config:FusedMoEParallelConfig": "tp_size tp_rank dp_size enable_eplb is_sequence_parallel",
    f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase": "moe_kernel is_monolithic",
    f"{_MOE}.modular_kernel:FusedMoEKernel": "fused_experts",
    f"{_MOE}.modular_kernel:FusedMoEExpertsModular": "apply activation quant_dtype",
    f"{_MOE}.routed_experts:RoutedExperts": "moe_config quant_method expert_map hidden_size activation",
    f"{_MOE}.runner.moe_runner:MoERunner": "routed_experts router",
    f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod": "forward_native",
    "vllm.model_executor.layers.linear:RowParallelLinear": "input_size input_size_per_partition output_size"
    " input_is_parallel tp_rank skip_bias_add bias",
    "vllm.multimodal.inputs:MultiModalFeatureSpec": "mm_position",
    "vllm.multimodal.inputs:PlaceholderRange": "offset length",
    "vllm.outputs:CompletionOutput": "text token_ids logprobs finish_reason",
    "vllm.outputs:RequestError": "code message retryable",
    "vllm.outputs:RequestOutput": "outputs prompt_token_ids prompt_logprobs num_cached_tokens",
    "vllm.pooling_params:PoolingParams": "extra_kwargs",
    "vllm.sampling_params:RequestOutputKind": "DELTA FINAL_ONLY",
    "vllm.sampling_params:SamplingParams": "n max_tokens temperature top_p seed stop logprobs prompt_logprobs"
    " detokenize skip_reading_prefix_cache repetition_penalty output_kind ignore_eos extra_args all_stop_token_ids"
    " _all_stop_token_ids bad_words_token_ids"
    " _bad_words_token_ids",
    "vllm.renderers.base:BaseRenderer": "model_config tokenizer",
    "vllm.utils.argparse_utils:FlexibleArgumentParser": "parse_known_args set_defaults get_default",
    "vllm.v1.core.sched.output:NewRequestData": "req_id sampling_params prompt_token_ids prompt_embeds"
    " prefill_token_ids",
    "vllm.v1.core.sched.scheduler:Scheduler": "requests",
    "vllm.v1.engine:EngineCoreRequest": "request_id client_index prompt_token_ids mm_features sampling_params"
    " pooling_params cache_salt resumable prompt_is_token_ids prompt_embeds",
    "vllm.v1.engine:FinishReason": "ERROR",
    "vllm.v1.engine.async_llm:AsyncLLM": "vllm_config model_config input_processor errored engine_core",
    "vllm.v1.engine.core:EngineCore": "vllm_config scheduler",
    "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer": "tokenizer skip_special_tokens",
    "vllm.v1.engine.input_processor:InputProcessor": "vllm_config model_config tokenizer",
    "vllm.v1.engine.llm_engine:LLMEngine": "vllm_config engine_core",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "needs_kv_cache_zeroing num_blocks",
    "vllm.v1.request:Request": "request_id client_index num_prompt_tokens num_tokens cache_salt sampling_params",
    "vllm.v1.utils:CpuGpuBuffer": "np gpu",
    "vllm.v1.worker.cpu_worker:CPUWorker": "model_runner",
    "vllm.v1.worker.gpu.input_batch:InputBatch": "req_ids query_start_loc_np num_computed_tokens_np idx_mapping_np"
    " num_computed_prefill_tokens_np prefill_len_np num_scheduled_tokens input_ids",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": "sampling_params generator prompt_token_ids"
    " num_computed_tokens",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "req_ids req_id_to_index num_computed_tokens_cpu"
    " num_prompt_tokens generators token_ids_cpu",
    "vllm.v1.worker.gpu_worker:Worker": "model_runner reload_weights",
    "vllm.v1.worker.worker_base:WorkerWrapperBase": "vllm_config worker",
}
"""Attributes that we read or set, by their class or module."""

ONLY_SOME_HAVE = {"vllm.outputs:RequestError": "to_exception"}
"""Attributes that we ask for with `hasattr`, since only some versions have them."""

RETURNS = {
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights": 4,
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": 2,
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": 2,
}
"""Functions that return so many things."""

SAYS = {
    f"{_V1}._bookkeeping_sync": ["self._get_prompt_logprobs_dict("],
    f"{_V1}.execute_model": ["self._update_states(", "self._prepare_inputs("],
    f"{_V2}.add_requests": [
        "self.model_state.add_request(req_index, new_req_data)",
        "self.prompt_logprobs_worker.add_request(",
    ],
    f"{_V2}.execute_model": ["self.model_state.prepare_inputs(input_batch, "],
    f"{_CHAT}.to_sampling_params": ["self.vllm_xargs", "extra_args=extra_args"],
    f"{_COMPLETION}.to_sampling_params": ["self.vllm_xargs", "extra_args=extra_args"],
    f"{_RESPONSES}.to_sampling_params": ["self.vllm_xargs", "extra_args=extra_args"],
    "vllm.entrypoints.anthropic.serving": ["vllm_xargs=anthropic_request.vllm_xargs"],
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state": ["state.openai_serving_models = "],
    "vllm.entrypoints.launchers.app:build_app": ["init_entrypoints_middleware(args, app, "],
    "vllm.entrypoints.launchers.run_batch": ["BatchRequestInput.model_validate_json(request_json)"],
    "vllm.v1.core.kv_cache_utils:get_request_block_hasher": ["generate_block_hash_extra_keys(request, "],
    "vllm.v1.engine.core:EngineCoreProc.process_input_sockets": [
        "self.preprocess_add_request(",
        "except Exception:",
        "self._handle_request_preproc_error(",
    ],
    "vllm.v1.engine.core:EngineCoreProc._handle_client_request": ["self.add_request(req, "],
    "vllm.v1.request:Request.from_engine_core_request": ["cache_salt=request.cache_salt"],
    "vllm.v1.worker.gpu.model_states:init_model_state": [
        "cls = resolve_model_state_cls(vllm_config, model)",
        "cls(vllm_config, model, encoder_cache, device)",
    ],
    "vllm.v1.worker.worker_base:WorkerWrapperBase.init_device": ["self.worker.init_device()"],
    f"{_MOE}.runner.moe_runner:MoERunner._apply_quant_method": [
        "self.router.select_experts(",
        "router_logits=router_logits,",
    ],
}
"""What must stand in the source of a function or module, in this order."""

BODIES = {
    f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.apply": "one kernel; router weights on its input or on its output",
    f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading": "packs into new tensors",
    f"{_MOE}.experts.triton_moe:TritonExperts.apply": "activation is called once between two products, for all tokens",
    f"{_MOE}.modular_kernel:FusedMoEKernelModularImpl._fused_experts": "all tokens at once, in the order of the batch",
    f"{_CHAT}.to_beam_search_params": "beam search drops the mask, so it is refused here",
    f"{_CHAT}.to_sampling_params": "vllm_xargs become extra_args",
    f"{_COMPLETION}.to_beam_search_params": "beam search drops the mask, so it is refused here",
    f"{_COMPLETION}.to_sampling_params": "vllm_xargs become extra_args",
    f"{_RESPONSES}.to_sampling_params": "vllm_xargs become extra_args",
    f"{_V1}._dummy_run": "only batches that belong to no request",
    f"{_V1}._prepare_inputs": "the order of the batch is final when it returns; the sampler's seeds",
    f"{_V1}.load_model": "the model is complete when it returns, and not compiled",
    f"{_V2}._dummy_run": "only batches that belong to no request",
    f"{_V2}._remove_request": "the state of a request goes, also of one that is preempted",
    f"{_V2}.execute_model": "inputs are prepared before every way to run the model, with graphs or without",
    f"{_V2}.finish_requests": "preempted requests are removed before others are added",
    f"{_V2}.prepare_inputs": "query_start_loc_np and num_computed_tokens_np of the batch",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "additional_config is still empty of ours",
    "vllm.entrypoints.generate.api_router:register_generate_api_routers": "new routes; whether they carry a mask",
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search": "params are the caller's own",
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state": "which flags and tasks it reads",
    "vllm.entrypoints.launchers.run_batch:run_batch": "every line is parsed as a BatchRequestInput before it runs",
    "vllm.entrypoints.scale_out.factories:register_scale_out_api_routers": "new routes; whether they carry a mask",
    "vllm.entrypoints.serve.exception_handling.error_response:create_error_response": "the form of vLLM's errors",
    "vllm.entrypoints.serve.utils.api_utils:get_max_tokens": "when it refuses a prompt for its length",
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights": "which files are weights",
    "vllm.renderers.base:BaseRenderer.validate_token_ids": "which ids it refuses",
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": "the form of keys; where the salt is",
    "vllm.v1.core.kv_cache_utils:get_request_block_hasher": "every hash is made with the extra keys",
    "vllm.v1.engine.async_llm:AsyncLLM.generate": "which errors pass as they are",
    "vllm.v1.engine.core:EngineCore.add_request": "it takes a request that has its mask",
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": "the request is made, and its prompt hashed, here",
    "vllm.v1.engine.core:EngineCoreProc._send_finish_outputs_to_client": "what a client is told of a failed request",
    "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer": "what its stream knows of the prompt",
    "vllm.v1.engine.input_processor:InputProcessor.__init__": "the front end's modules are imported",
    "vllm.v1.engine.input_processor:InputProcessor._validate_prompt_len": "when it refuses a prompt for its length",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": "sampling parameters are a copy of its own",
    "vllm.v1.request:Request.from_engine_core_request": "what a request takes over",
    "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.capture": "graphs are captured with dummy inputs alone",
    f"{_V2_SCORES}.compute_prompt_logprobs": "which hidden states and tokens a prompt's scores are of",
    "vllm.v1.worker.gpu.input_batch:InputBatch": "padding behind the requests",
    "vllm.v1.worker.gpu.model_states.interface:ModelState": "new methods that see batches or requests",
    "vllm.v1.worker.gpu.model_states:resolve_model_state_cls": "which class a model has",
    "vllm.v1.worker.worker_base:WorkerWrapperBase.init_device": "the model runner exists, and has no model yet",
}
"""Functions and classes whose inside matters, with what to look for. A change is no breach, but must be read."""

_ROUTES = """
    /abort_requests /classify /cohere/v2/chat /cohere/v2/chat/render /collective_rpc /detokenize /fault_tolerance/apply
    /finish_weight_update /generative_scoring /inference/v1/generate /init_weight_transfer_engine /invocations
    /is_scaling_elastic_ep /pause /ping /pooling /release_kv_cache_memory /rerank /reset_encoder_cache /reset_mm_cache
    /reset_prefix_cache /resume /scale_elastic_ep /score /shutdown_weight_transfer_engine /sleep
    /start_draft_weight_update /start_profile /start_weight_update /stop_profile /tokenize /update_weight_version
    /update_weights /v1/audio/transcriptions /v1/audio/translations /v1/chat/completions /v1/chat/completions/batch
    /v1/chat/completions/derender /v1/chat/completions/render /v1/completions /v1/completions/derender
    /v1/completions/render /v1/decisions /v1/embeddings /v1/load_lora_adapter /v1/messages /v1/messages/count_tokens
    /v1/messages/render /v1/realtime /v1/rerank /v1/responses /v1/responses/render /v1/responses/{response_id}/cancel
    /v1/score /v1/systemone /v1/unload_lora_adapter /v2/embed /v2/rerank /wake_up /weight_checker
"""
ROUTES = frozenset(_ROUTES.split())
"""Routes of vLLM that take a body and have been read: whether a mask reaches the engine from there. On a route that is
not known a mask is refused, as on all that are not in `CARRYING`."""

"""Llama, and those that have its parts: Mistral and Qwen2."""

from crane_serve.common.models.family import RMS_NORM, Family

LLAMA = Family(("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"), norm=RMS_NORM)

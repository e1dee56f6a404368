"""Engines: what samples completions from the current policy."""

from lit_grpo.engines.base import Deadline, Engine, Sampling, Stopped
from lit_grpo.engines.hf_engine import HFEngine
from lit_grpo.engines.vllm_engine import VLLMEngine
from lit_grpo.engines.weights import full_adapters, full_weights

__all__ = ["Deadline", "Engine", "HFEngine", "Sampling", "Stopped", "VLLMEngine", "full_adapters", "full_weights"]

"""Hugging Face's `config.json` of the DeepSeek V2/V3 family: into a spec, and out of one."""

from dsl.hf.config_file import read_config
from dsl.hf.keys import KEPT, language_model
from dsl.hf.longcat import unread_tensors
from dsl.hf.read import spec_from_hf
from dsl.hf.write import hf_config

__all__ = ["KEPT", "hf_config", "language_model", "read_config", "spec_from_hf", "unread_tensors"]

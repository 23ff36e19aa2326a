"""`dslc import` of what transformers saves: every tensor keeps its bytes, there and back."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsl.hf import unread_tensors
from tests.oracle.cases import RELATIVES
from tests.support.command import Run
from tests.support.configs import Case
from tests.support.reference import Reference

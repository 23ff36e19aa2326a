"""Texts of a spec are data: none is ever run, and none breaks what is generated."""

from __future__ import annotations

import ast
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.build import package
from backends.report.steps import render_steps
from compiler.analysis import summary
from compiler.pipeline import compile
from dsl.diagnostic import DiagnosticError
from dsl.load import load
from tests.support.places import TINY

USE = "SwiGLU(intermediate_size=hidden_size * 3)"  # of the first layer
SHORT = "architecture.mtp={depth: 0}"
"""Of a smaller model, for texts that are the same in any."""
STEPS = "steps.html"  # the page of `dslc graph --html`, which is no file of a build
TRIPWIRE = "__import__('pathlib').Path('tripped').touch()"
HOSTILE = [
    f'"""\n{TRIPWIRE}\n"""',
    f'"; {TRIPWIRE}; "',
    f"'; {TRIPWIRE}; '",
    f"{{{{ {TRIPWIRE} }}}}",
    f"{{% set x = {TRIPWIRE} %}}",
    f"${{{TRIPWIRE}}}",
    f'\\"""{TRIPWIRE}',
    "\\",
    '"""',
    '""""',
    'a"',
    "\\N{BULLET} \\x00 \\u202e",
    "\u202e\u2028\u2029\u0085 right to left",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "]]> --> <!-- & &amp; </style>",
    "{hidden_size} {0} %s %(x)s",
    "# comment\nimport os",
]


def quoted(text: str) -> str:
    """A YAML double-quoted scalar."""
    body = "".join(c if c.isascii() and c.isprintable() else f"\\U{ord(c):08x}" for c in
                   text.replace("\\", "\\\\").replace('"', '\\"'))  # fmt: skip
    return f'"{body}"'


class Scripts(HTMLParser):
    found = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += tag in ("script", "img") or any(name.startswith("on") for name, _ in attrs)


def scripts(text: str) -> int:
    """How many scripts, images and handlers of events a page holds."""
    page = Scripts()
    page.feed(text)
    return page.found


def check(files: dict[str, bytes]) -> None:
    """Generated Python parses, calls nothing of the text, and the report holds no script.

    The page that steps through the passes holds its own script and no other.
    """
    for name, data in files.items():
        text = data.decode()
        if name.endswith(".py") and not name.startswith("runtime/"):
            calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
            assert "__import__" not in {getattr(c.func, "id", "") for c in calls}
        if name.endswith(".html"):
            assert scripts(text) == (name == STEPS)


def files_of(path: Path, *sets: str) -> dict[str, bytes] | None:
    try:
        description = load(path, sets=sets)
        compiled = compile(description)
        numbers = summary(compiled.lowered, compiled.programs["decode"])
        page = render_steps(description, compiled, version="0", start="train-1")
        return {**package(description, compiled, numbers), STEPS: page.encode()}
    except DiagnosticError as error:
        assert error.diagnostics
        return None


def test_what_people_write_about_a_model_stays_text(tmp_path: Path) -> None:
    """The packages are imported in a process of their own: texts are unchanged, nothing ran."""
    for i, text in enumerate(HOSTILE):
        files = files_of(TINY, f"about={quoted(text)}", SHORT)
        assert files is not None
        check(files)
        for name, data in files.items():
            path = tmp_path / f"hostile_{i}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    script = "import importlib\n"
    script += f"for i in range({len(HOSTILE)}):\n"
    script += "    print(ascii(importlib.import_module(f'hostile_{i}').config.about))\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [ast.literal_eval(line) for line in done.stdout.splitlines()] == HOSTILE
    assert not (tmp_path / "tripped").exists()


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "path", ["model", "blocks.0", "params.mtp_concat", "architecture.layers.0.attention",
             "architecture.block", "precision.policy", "train.loss.mtp_weight"],
)  # fmt: skip
def test_other_texts_are_refused_or_harmless(path: str, text: str) -> None:
    files = files_of(TINY, f"{path}={quoted(text)}")
    if files is not None:
        check(files)


@pytest.mark.parametrize("text", [t for t in HOSTILE if '"""' not in t])
def test_texts_of_a_block_file_stay_text(text: str, tmp_path: Path) -> None:
    """The docstring of a block becomes one of a class; a remark stands in the margin."""
    line = text.replace("\n", " ")
    (tmp_path / "mine.dsl").write_text(f'''block Mine(x: [.., hidden_size]) -> [.., hidden_size]:
  """{text}"""
  params hidden_size
  return linear(x, to = hidden_size, name = proj)  # {line}
''')
    spec = TINY.read_text().replace("blocks: [", "blocks: [./mine.dsl, ")
    (tmp_path / "spec.yaml").write_text(spec.replace(USE, "Mine"))
    files = files_of(tmp_path / "spec.yaml", SHORT)
    if files is not None:
        check(files)


# Words of Python, and what modules have already: weights cannot be called so.
REFUSED = ["config", "type", "class", "lambda", "None"]
NAMES = ["self", "F", "torch", "nn", "Tensor", "cache", "layer", "expert", "Model", "list", "super"]


@pytest.mark.parametrize("name", [*NAMES, *REFUSED])
def test_names_of_python_and_of_generated_code_can_be_used(name: str, tmp_path: Path) -> None:
    """As a tensor and as a weight, or they are refused; never do they hide another name."""
    (tmp_path / "mine.dsl").write_text(f"""block Mine(x: [.., hidden_size]) -> [.., hidden_size]:
  params hidden_size
  {name} = linear(x, to = hidden_size, name = {name})
  y = linear({name}, to = hidden_size, name = {name}_2)
  return y + {name}
""")
    spec = TINY.read_text().replace("blocks: [", "blocks: [./mine.dsl, ")
    (tmp_path / "spec.yaml").write_text(spec.replace(USE, "Mine"))
    files = files_of(tmp_path / "spec.yaml", SHORT)
    assert (files is None) == (name in REFUSED)
    if files is None:
        return
    check(files)
    hides_nothing(files["model.py"].decode())


def hides_nothing(source: str) -> None:
    """No assignment hides a name that the module itself needs."""
    needed = {"torch", "Tensor", "nn", "F", "Cache", "Loss", "Output", "self", "super"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assert node.id not in needed, node.id


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=60))
def test_any_text_about_a_model(text: str) -> None:
    files = files_of(TINY, f"about={quoted(text)}", SHORT)
    if files is not None:
        check(files)

"""What the documents name is there: files, links, headings, functions, rules, make targets,
commands and their flags.

Comments and docstrings are held to the same where they name a file or a heading. `bench/LOG.md` is
an archive, whose names are those of its day: only its links count.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.commands import build_parser

REPOSITORY = Path(__file__).resolve().parent.parent
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
).stdout.split()
FILES = [name for name in LISTED if (REPOSITORY / name).is_file()]
FOLDERS = {name.split("/")[0] for name in FILES if "/" in name}
TEXTS = {name: (REPOSITORY / name).read_text() for name in FILES if name.endswith((".md", ".py", ".pyi", ".rs"))}
DOCUMENTS = {name: text for name, text in TEXTS.items() if name.endswith(".md")}
LIVING = {name: text for name, text in DOCUMENTS.items() if name != "bench/LOG.md"}

FILE = re.compile(r"[\w./*-]+\.(py|pyi|rs|md|toml)")
FOREIGN = {  # files of other projects, which the text names beside them
    "docs/gguf.md",  # ggml
    "modeling_rope_utils.py",  # transformers
    "utils/context.py",  # nano-vllm
}


def exists(path: str) -> bool:
    """A folder by its path; a file by its path, by the end of its path, or by a pattern of either."""
    pattern = path.strip("/")
    return (REPOSITORY / pattern).is_dir() or any(fnmatch.fnmatch("/" + name, "*/" + pattern) for name in FILES)


def test_files_exist() -> None:
    missing = []
    for name, text in TEXTS.items():
        if name == "bench/LOG.md":
            continue
        for word in (word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()):
            path = word.split("::")[0]
            is_below = name in LIVING and "/" in path and path.split("/")[0] in FOLDERS
            if (FILE.fullmatch(path) or is_below) and path not in FOREIGN and not exists(path):
                missing.append((name, path))
    assert not missing


def test_functions_exist() -> None:
    """`file::name` is a function or a type of the file."""
    missing = []
    for name, text in LIVING.items():
        for path, function in re.findall(r"`([\w./]+\.(?:py|rs))::(\w+)`", text):
            if not re.search(rf"\b(def|class|fn|struct|enum) {function}\b", TEXTS.get(path, "")):
                missing.append((name, f"{path}::{function}"))
    assert not missing


def test_rules_exist() -> None:
    """The core and its simulation cite S, L and E of `docs/invariants.md`."""
    rules = set(re.findall(r"^\| ([SLE]\d+) \|", DOCUMENTS["docs/invariants.md"], re.M))
    texts = {name: text for name, text in TEXTS.items() if name.startswith(("rust/", "tests/simulation/"))}
    cited = {(name, rule) for name, text in texts.items() for rule in re.findall(r"\b[SLE]\d{1,2}\b", text)}
    assert cited and not {(name, rule) for name, rule in cited if rule not in rules}


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_resolve() -> None:
    broken = []
    for name, text in DOCUMENTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = ((REPOSITORY / name).parent / path).resolve() if path else REPOSITORY / name
            if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
                broken.append((name, target))
    assert not broken


def test_headings_exist() -> None:
    """A document and a heading in quotes behind it, over the end of a line too."""
    missing = []
    for name, text in TEXTS.items():
        flowing = re.sub(r"\s*\n\s*(//[/!]|#)?\s*", " ", text)
        for path, heading in re.findall(r'([\w/]+\.md)`?, "([^"]+)"', flowing):
            found = [text for file, text in DOCUMENTS.items() if ("/" + file).endswith("/" + path)]
            if not any(f"# {heading}\n" in text for text in found):
                missing.append((name, path, heading))
    assert not missing


def commands(text: str) -> Iterator[str]:
    """What stands between backticks, and the lines of code blocks."""
    blocks = re.compile(r"^ *```.*?^ *```", re.M | re.S)
    for block in blocks.findall(text):
        yield from block.splitlines()[1:-1]
    yield from re.findall(r"`([^`\n]+)`", blocks.sub("", text))


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    asked = {
        (name, target)
        for name, text in LIVING.items()
        for command in commands(text)
        for target in re.findall(r"^make ([a-z-]+)", command)
    }
    assert asked and not {(name, target) for name, target in asked if target not in targets}


def test_modules_exist() -> None:
    """`python -m bench.kernels.step`, `python bench/cpu_decode.py`; octavo's own modules lie under
    `python`.
    """
    missing = []
    for name, text in LIVING.items():
        for command in commands(text):
            for module in re.findall(r"\bpython3? -m ((?:bench|tests|octavo)[\w.]*)", command):
                path = module.replace(".", "/")
                if not exists(f"{path}.py") and not exists(f"{path}/__main__.py"):
                    missing.append((name, module))
            missing += [(name, path) for path in re.findall(r"\bpython3? ([\w/]+\.py)", command) if path not in FILES]
    assert not missing


def test_commands_of_octavo_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command's help has the flags that the documents give it."""
    checked, wrong = 0, []
    for name, text in LIVING.items():
        for command in commands(text):
            match = re.match(r"(?:\S+=\S+ )*(?:\S*/)?octavo (\S[^|#]*)$", command.split("#")[0])
            if match is None:
                continue
            words = match[1].split()
            with pytest.raises(SystemExit):
                build_parser().parse_args([*words[: 1 + (words[0] == "bench")], "--help"])
            shown = capsys.readouterr().out
            flags = [word.partition("=")[0] for word in words if word.startswith("--")]
            if not shown or not all(re.search(rf"(?<![\w-]){flag}(?![\w-])", shown) for flag in flags):
                wrong.append((name, command))
            checked += 1
    assert checked > 30 and not wrong

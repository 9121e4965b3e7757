"""docs/errors.md names every code that the server can answer with, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RAISED_BY_START_UP = {"invalid_gguf"}


def documented() -> dict[str, str]:
    """Code to status, as the document has them."""
    text = (ROOT / "docs/errors.md").read_text()
    return dict(re.findall(r"^\| `([a-z_]+)` \| (\w+) \|", text.partition("## Codes")[2], re.MULTILINE))


def in_python() -> set[str]:
    """What is given as a code: a word at the place of `code` in the calls that make errors."""
    places = {
        "ApiError": 1,
        "_bad": 1,
        "_bad_tools": 1,
        "ChatError": 2,
        "bad_request": 2,
        "fail_step": 1,
        "over_limit": 0,
    }
    found: set[str] = set()
    files = [
        *(ROOT / "python/octavo/server").rglob("*.py"),
        ROOT / "python/octavo/engine/engine.py",
        ROOT / "python/octavo/chat.py",
    ]
    for call in (
        node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
    ):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in places:
            continue
        given = [*call.args[places[name] :][:1], *(keyword.value for keyword in call.keywords if keyword.arg == "code")]
        words = [node.value for part in given for node in ast.walk(part) if isinstance(node, ast.Constant)]
        found |= {word for word in words if isinstance(word, str)}
    from octavo.server.middleware import _CODES

    return {word for word in found if re.fullmatch(r"[a-z]+(_[a-z]+)+", word)} | set(_CODES.values())


def in_rust() -> set[str]:
    """The arms of the two functions `code`, what is refused of a body or a
    constraint, and what ends all replies.
    """
    found: set[str] = set()
    for name in ("error.rs", "output.rs"):
        text = (ROOT / "rust" / name).read_text()
        arms = re.search(r"fn code\(&?self\).*?\n    }", text, re.DOTALL)
        assert arms is not None
        found |= set(re.findall(r'=> "([a-z_]+)"', arms.group()))
    for path in ("protocol/body.rs", "protocol/prompts.rs"):
        code = (ROOT / "rust" / path).read_text().partition("#[cfg(test)]")[0]
        found |= set(re.findall(r'(?:Error::body|refused)\(\s*"([a-z_]+)"', code))
    constraints = "".join((ROOT / "rust/grammar" / name).read_text() for name in ("constraint.rs", "kind.rs"))
    found |= set(re.findall(r'code(?: = |: ).*?"([a-z_]+)"', constraints))
    found |= set(re.findall(r'else \{ "([a-z_]+)" \}', constraints))
    ends = re.findall(r'pub const \w+: &str = "([a-z_]+)";', (ROOT / "rust/output.rs").read_text())
    return found.union(ends) - RAISED_BY_START_UP


def test_every_code_is_documented_and_every_documented_one_exists() -> None:
    python, rust = in_python(), in_rust()
    assert len(python) > 20 and len(rust) > 15
    assert set(documented()) == python | rust

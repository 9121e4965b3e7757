"""`octavo chat` through a real terminal: keys go in, the screen and the conversation that the
engine saw come out.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

CTRL_A, CTRL_C, CTRL_D, UP = "\x01", "\x03", "\x04", "\x1b[A"
ANSWER = "Hello world"
PATIENCE = 20.0


class Terminal:
    """A process on a pseudo-terminal, and everything it has written there."""

    def __init__(self, record: Path, *words: str, delay: float = 0.0, stdout: Any = None, **environment: str) -> None:
        self.record = record
        self.screen = ""
        self._raw = ""
        self._seen = 0
        self._keys, side = pty.openpty()
        python_path = f"{REPOSITORY / 'python'}:{REPOSITORY}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.scripted_chat", str(record), str(delay), *words],
            stdin=side,
            stdout=stdout or side,
            stderr=side,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": python_path, "TERM": "xterm", "INPUTRC": "/dev/null", **environment},
        )
        os.close(side)

    def press(self, keys: str | bytes) -> None:
        os.write(self._keys, keys if isinstance(keys, bytes) else keys.encode())

    def paste(self, text: str) -> None:
        """As terminals do: between brackets where the program has asked for them."""
        asked = self._raw.rfind("\x1b[?2004h") > self._raw.rfind("\x1b[?2004l")
        text = text.replace("\n", "\r")
        self.press(f"\x1b[200~{text}\x1b[201~" if asked else text)

    def wait_for(self, text: str) -> None:
        """Until `text` stands on the screen behind what was waited for before."""
        assert self._comes(text, PATIENCE), f"no {text!r} in {self.screen[self._seen :]!r}"

    def interrupt(self, then: str) -> None:
        """Ctrl-C at the prompt, until it shows: one between readline's prompt and its wait for a
        key shows at the next key, which only programs are fast enough to see.
        """
        for _ in range(5):
            self.press(CTRL_C)
            if self._comes(then, PATIENCE / 5):
                return
        raise AssertionError(f"no {then!r} in {self.screen[self._seen :]!r}")

    def _comes(self, text: str, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while (place := self.screen.find(text, self._seen)) < 0:
            ready = select.select([self._keys], [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready or not self._read():
                return False
        self._seen = place + len(text)
        return True

    def say(self, text: str) -> None:
        """Types a message and waits for its answer and for the next prompt."""
        self.press(text + "\r")
        self.wait_for(ANSWER)
        self.wait_for("> ")

    def leave(self) -> int:
        """Ctrl-D; the exit code."""
        self.press(CTRL_D)
        while self._read():
            pass
        return self.process.wait(PATIENCE)

    def conversations(self) -> list[list[tuple[str, str]]]:
        """(role, content) of the messages of each prompt."""
        lines = self.record.read_text().splitlines()
        return [[(message["role"], message["content"]) for message in json.loads(line)] for line in lines]

    def last_message(self) -> Any:
        return self.conversations()[-1][-1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keys)

    def _read(self) -> bool:
        try:
            piece = os.read(self._keys, 65536)
        except OSError:  # the process has gone
            return False
        text = piece.decode(errors="replace")
        self._raw += text
        # What readline sends to move about and to bracket pastes is no text.
        self.screen += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text).replace("\r", "")
        return bool(piece)


Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a chat and waits for its prompt."""
    terminals: list[Terminal] = []

    def started(*words: str, **options: Any) -> Terminal:
        terminals.append(Terminal(tmp_path / "prompts.jsonl", "chat", *words, **options))
        terminals[-1].wait_for("> ")
        return terminals[-1]

    yield started
    for terminal in terminals:
        terminal.close()


def test_lines_are_edited_and_come_back(start: Start) -> None:
    chat = start()
    chat.say("ome\x1b[D\x7fn")  # an arrow and a backspace: "one"
    assert chat.last_message() == ("user", "one")
    chat.say(UP + CTRL_A + "tw" + "\x1b[C\x1b[3~\x1b[3~")
    assert chat.last_message() == ("user", "two")
    chat.say(UP + UP)
    assert chat.last_message() == ("user", "one")
    assert chat.leave() == 0
    # Each prompt begins a line, and so does what comes after the program.
    assert chat.screen.count(f"\n{ANSWER}\n> ") == 3 and chat.screen.endswith("> \n")


def test_a_paste_is_one_message(start: Start) -> None:
    chat = start(delay=0.05)
    chat.paste("def f():\n\treturn 1\n\n# end")
    chat.say(" of it")
    assert chat.last_message() == ("user", "def f():\n\treturn 1\n\n# end of it")
    chat.paste("/clear\nthe table")
    chat.say("")
    assert chat.last_message() == ("user", "/clear\nthe table")
    chat.press("next\r")
    chat.wait_for(ANSWER[:2])
    chat.paste("pasted while\nthe answer ran")
    chat.press("\r")
    chat.wait_for("> ")
    chat.wait_for(ANSWER)
    chat.wait_for("> ")
    assert chat.last_message() == ("user", "pasted while\nthe answer ran")
    assert chat.leave() == 0


def test_ctrl_c_clears_the_line_or_ends_the_answer(start: Start) -> None:
    chat = start(delay=0.2)
    chat.press("never sent")
    chat.wait_for("never sent")
    chat.interrupt("\n> ")
    chat.interrupt("Ctrl-D or /exit leaves.\n> ")
    chat.press("one\r")
    chat.wait_for(ANSWER[:3])
    chat.press(CTRL_C)
    chat.wait_for("\n> ")
    chat.say("two")  # the whole answer: the interrupt was for the one before
    first, (question, part, second) = chat.conversations()
    assert first == [question] == [("user", "one")] and second == ("user", "two")
    assert part[0] == "assistant" and ANSWER.startswith(part[1]) and 3 <= len(part[1]) < len(ANSWER)
    chat.press("half a line")
    chat.wait_for("half a line")
    chat.interrupt("\n> ")
    chat.say("three")
    assert chat.last_message() == ("user", "three")
    assert chat.leave() == 0


def test_commands(start: Start) -> None:
    chat = start("--system", "Be brief.")
    chat.press("/help\r")
    chat.wait_for("/system TEXT")
    chat.say("one")
    chat.press("/system Be kind.\r")
    chat.say("two")
    chat.press("/clear\r")
    chat.wait_for("starts over.\n> ")
    chat.say("three")
    chat.press("/system\r")
    chat.say("/etc/hosts, what is that?")
    chat.press("/frobnicate\r")
    chat.wait_for("/frobnicate is no command.\n/help")
    chat.press("/exit\r")
    assert chat.process.wait(PATIENCE) == 0
    answer = ("assistant", ANSWER)
    brief, kind = (("system", f"Be {how}.") for how in ("brief", "kind"))
    one, two, three, hosts = (("user", text) for text in ("one", "two", "three", "/etc/hosts, what is that?"))
    assert chat.conversations() == [
        [brief, one],
        [kind, one, answer, two],
        [kind, three],
        [three, answer, hosts],
    ]


def test_a_full_context_is_said_as_that(start: Start) -> None:
    chat = start()
    chat.press("x" * 500 + "\r")
    chat.wait_for("The message is too long: it has 506 tokens, but the model's context is 400 tokens.")
    chat.wait_for("send a shorter one.\n> ")
    chat.say("y" * 300)
    chat.press("z" * 300 + "\r")
    chat.wait_for("The conversation is too long: it has ")
    chat.wait_for("/clear starts over.\n> ")
    chat.press("z" * 62 + "\r")  # leaves room for four tokens
    chat.wait_for(ANSWER[:4] + "\n(cut after 4 tokens: the context of 400 tokens is full, /clear starts over)\n> ")
    chat.press("/clear\r")
    chat.say("short")
    assert chat.conversations()[-1] == [("user", "short")]
    assert chat.leave() == 0


def test_without_readline_a_burst_of_lines_is_one_message(start: Start) -> None:
    chat = start(NO_READLINE="1")
    for pasted in ("one\ntwo\nthree", "one\ntwo\n"):
        chat.paste(pasted)
        time.sleep(0.3)  # as a person does before Enter
        chat.say("")
        assert chat.last_message() == ("user", pasted.strip())
    chat.say("four")
    assert chat.last_message() == ("user", "four")
    chat.press("never sent")
    chat.wait_for("never sent")
    chat.interrupt("\n> ")
    assert chat.leave() == 0


def test_text_that_is_none_does_not_end_the_conversation(start: Start) -> None:
    chat = start(NO_READLINE="1")  # readline drops what is no text
    chat.press(b"caf\xe9\r")
    chat.wait_for("the standard input is not UTF-8")
    chat.wait_for("> ")
    chat.say("caf\u00e9")
    assert chat.conversations() == [[("user", "caf\u00e9")]]
    assert chat.leave() == 0


def test_answers_go_elsewhere(start: Start, tmp_path: Path) -> None:
    """As in `octavo chat > answers`: a person still sees the prompt, and the file has answers
    alone.
    """
    with (tmp_path / "answers").open("wb") as answers:
        chat = start(stdout=answers)
    for text in ("one", "two"):
        chat.press(text + "\r")
        chat.wait_for("> ")
    assert chat.leave() == 0
    assert (tmp_path / "answers").read_text() == f"{ANSWER}\n" * 2
    assert len(chat.conversations()) == 2


def test_ctrl_c_ends_what_reads_from_a_pipe(tmp_path: Path) -> None:
    """There is nobody at a prompt to go back to."""
    record = tmp_path / "prompts.jsonl"
    command = [sys.executable, "-m", "tests.scripted_chat", str(record), "0.2", "chat"]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'python'}:{REPOSITORY}"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as chat:
        assert chat.stdin is not None and chat.stdout is not None and chat.stderr is not None
        chat.stdin.write(b"one\ntwo\n")
        chat.stdin.flush()
        assert chat.stdout.read(2) == ANSWER[:2].encode()
        chat.send_signal(signal.SIGINT)
        assert chat.wait(PATIENCE) == 130
        rest = chat.stdout.read().decode()
        assert rest.endswith("\n") and ANSWER[2:].startswith(rest[:-1]) and len(rest) < 5
        assert chat.stderr.read() == b"octavo: interrupted\n"
    assert len(record.read_text().splitlines()) == 1

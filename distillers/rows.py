"""Makes rows of data sets as they are found into the documents and preferences of docs/records.md.

Columns go by the names that are usual on the hub (Alpaca, ShareGPT, UltraChat, UltraFeedback, Orca) unless the options
name them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..harness.documents import ANSWER
from ..harness.interfaces import MambabenchError
from .data_configs import DatasetConfig

Row = Mapping[str, Any]
Messages = list[dict[str, str]]

NAMES = {
    "text": ("text", "content"),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "input": ("input",),
    "completion": ("completion", "output", "response", "answer"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
"""Usual names of each column, the most telling first."""
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
}
SPOKEN = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class Reader:
    """Knows which column is what, from the options and the columns of the first row."""

    def __init__(self, config: DatasetConfig, columns: Sequence[str], where: str) -> None:
        self.config, self.where, self.row = config, where, where
        self.columns = {role: self._column(role, columns) for role in NAMES}
        if self.columns["input"] == self.columns["prompt"]:
            self.columns["input"] = ""
        self.form = self._form(columns)

    def records(self, row: Row, number: int) -> Iterator[dict[str, Any]]:
        """The documents or preferences of a row, in the forms of docs/records.md; none where something is missing."""
        self.row = f"{self.where}: row {number}"
        match self.form:
            case "text":
                made = [{"text": self._text(row, "text")}] if self._text(row, "text").strip() else []
            case "completion":
                made = self._completion(row)
            case "chat":
                made = self._chat(self._conversation(row))
            case _:
                made = self._preference(row)
        yield from made

    def _column(self, role: str, columns: Sequence[str]) -> str:
        named = getattr(self.config, f"{role}_column")
        if named and named not in columns:
            raise MambabenchError(f"{self.where}: no column {named!r}; there are {', '.join(columns)}")
        return named or next((name for name in NAMES[role] if name in columns), "")

    def _form(self, columns: Sequence[str]) -> str:
        has = {role for role, column in self.columns.items() if column}
        needs = {
            "preference": {"chosen", "rejected"},
            "chat": {"messages"},
            "completion": {"prompt", "completion"},
            "text": {"text"},
        }
        if self.config.form != "auto":
            lacking = sorted(needs[self.config.form] - has)
            if lacking:
                raise MambabenchError(
                    f"{self.where}: no column for {' and '.join(lacking)}; name it as `{lacking[0]}_column`, one of "
                    f"{', '.join(columns)}"
                )
            return self.config.form
        named = {role for role in NAMES if getattr(self.config, f"{role}_column")}
        fitting = [form for form, needed in needs.items() if needed <= has]
        for form in fitting:
            if named & needs[form]:
                return form
        if not fitting:
            raise MambabenchError(
                f"{self.where}: the columns {', '.join(columns)} are none of the usual ones; name them, such as "
                'text_column = "…"'
            )
        return fitting[0]

    def _text(self, row: Row, role: str) -> str:
        value = row.get(self.columns[role]) if self.columns[role] else None
        if value is not None and not isinstance(value, str):
            raise MambabenchError(
                f"{self.row}: column {self.columns[role]!r} holds {type(value).__name__}, where text is wanted"
            )
        return value or ""

    def _prompt(self, row: Row) -> str:
        return "\n\n".join(filter(None, (self._text(row, "prompt"), self._text(row, "input"))))

    def _before_text(self, row: Row) -> str:
        """A prompt given as text, with the empty line that parts it from its answer."""
        return "".join(f"{part}\n\n" for part in (self._text(row, "system"), self._prompt(row)) if part)

    def _opening(self, row: Row) -> Messages:
        """A prompt given as text, as the beginning of a chat."""
        given = [("system", self._text(row, "system")), ("user", self._prompt(row))]
        return [{"role": role, "content": content} for role, content in given if content]

    def _completion(self, row: Row) -> list[dict[str, Any]]:
        completion = self._text(row, "completion")
        if not completion.strip():
            return []
        if self.config.chat == "messages":
            return [self._written([*self._opening(row), _answer(completion)])] if self._prompt(row) else []
        return [self._continued(self._before_text(row), completion)]

    def _conversation(self, row: Row) -> Messages:
        messages = self._turns(row.get(self.columns["messages"]))
        system = self._text(row, "system")
        return [{"role": "system", "content": system}, *messages] if system and messages else messages

    def _turns(self, value: Any) -> Messages:
        """A list of turns (`role` and `content`, or `from` and `value`), or a single one."""
        turns = [value] if isinstance(value, Mapping) else [] if value is None else value
        if not isinstance(turns, list):
            raise MambabenchError(f"{self.row}: a chat is {type(turns).__name__}, where a list of turns is wanted")
        messages = []
        for turn in turns:
            if not isinstance(turn, Mapping):
                raise MambabenchError(f"{self.row}: a turn of a chat is {type(turn).__name__}, where a table is wanted")
            role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            if not isinstance(role, str) or role not in ROLES:
                raise MambabenchError(f"{self.row}: a turn of a chat has the role {role!r}; known: {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise MambabenchError(
                    f"{self.row}: the content of a turn of a chat is {type(content).__name__}, where text is wanted"
                )
            messages.append({"role": ROLES[role], "content": content})
        return messages

    def _chat(self, messages: Messages) -> list[dict[str, Any]]:
        ends = [
            end
            for end, turn in enumerate(messages)
            if turn["role"] == ANSWER and turn["content"].strip() and any(t["role"] == "user" for t in messages[:end])
        ]
        if self.config.turns == "first":
            ends = ends[:1]
        elif self.config.turns == "last" or self.config.learn == "all":
            ends = ends[-1:]
        chats = [messages[: end + 1] for end in ends]
        if self.config.chat != "plain":
            return [self._written(chat) for chat in chats]
        return [self._continued(spoken(chat[:-1]), " " + chat[-1]["content"]) for chat in chats]

    def _written(self, chat: Messages) -> dict[str, Any]:
        return {"messages": chat, "whole": True} if self.config.learn == "all" else {"messages": chat}

    def _continued(self, prompt: str, completion: str) -> dict[str, Any]:
        whole = {"text": prompt + completion}
        return whole if self.config.learn == "all" else {"prompt": prompt, "completion": completion}

    def _preference(self, row: Row) -> list[dict[str, Any]]:
        pair = [row.get(self.columns[role]) for role in ("chosen", "rejected")]
        texts = [answer for answer in pair if isinstance(answer, str)]
        if len(texts) == 2 and not self.columns["messages"] and self.config.chat != "messages":
            return [pair_of(self._before_text(row), *texts)] if self._prompt(row) and _differ(*texts) else []
        chats = [[_answer(answer)] if isinstance(answer, str) else self._turns(answer) for answer in pair]
        if not all(chats):
            return []
        prompt, other = (chat[:-1] or self._before(row) for chat in chats)
        chosen, rejected = (chat[-1] for chat in chats)
        fits = prompt == other and any(turn["role"] == "user" for turn in prompt)
        if not fits or {chosen["role"], rejected["role"]} != {ANSWER} or not _differ(*_contents(chosen, rejected)):
            return []
        if self.config.chat == "plain":
            return [pair_of(spoken(prompt), *(f" {content}" for content in _contents(chosen, rejected)))]
        return [pair_of(prompt, [chosen], [rejected])]

    def _before(self, row: Row) -> Messages:
        """The prompt of answers that come without one."""
        if self.columns["messages"]:
            return self._conversation(row)
        prompt = row.get(self.columns["prompt"])
        return self._opening(row) if isinstance(prompt, str) else self._turns(prompt)


def spoken(messages: Messages) -> str:
    """A chat as plain text, up to where the assistant speaks.

    >>> spoken([{"role": "user", "content": "Hi!"}])
    'User: Hi!\\n\\nAssistant:'
    """
    return "\n\n".join([f"{SPOKEN[turn['role']]}: {turn['content']}" for turn in messages] + [f"{SPOKEN[ANSWER]}:"])


def _answer(content: str) -> dict[str, str]:
    return {"role": ANSWER, "content": content}


def pair_of(prompt: str | Messages, chosen: str | Messages, rejected: str | Messages) -> dict[str, Any]:
    """A preference, as docs/records.md has it."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _contents(*turns: Mapping[str, str]) -> list[str]:
    return [turn["content"] for turn in turns]


def _differ(chosen: str, rejected: str) -> bool:
    return bool(chosen.strip() and rejected.strip()) and chosen != rejected

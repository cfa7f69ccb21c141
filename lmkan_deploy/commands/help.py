"""How help texts look: words and examples stay whole, whatever the terminal's width."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import typer.core

# Where typer takes them from depends on its release.
_Context: Any = typer.core.TyperCommand.context_class
_BaseFormatter: Any = _Context.formatter_class

MAX_WIDTH = 120
"""Columns, in a terminal that has more."""

_HYPHEN = "\N{NON-BREAKING HYPHEN}"


class _Formatter(_BaseFormatter):  # type: ignore[misc]
    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        for brackets in (r"\{(\w+)(?:\.\.\.)?\}", r"\[(\[\w+\]\.\.\.)\]\.\.\."):  # typer's, around ours
            args = re.sub(brackets, r"\1", args)
        super().write_usage(prog, args, prefix)

    def write_text(self, text: str) -> None:
        """Writes paragraphs; the indented ones are examples, to be copied as they are."""
        paragraphs = text.replace("-", _HYPHEN).split("\n\n")
        super().write_text(
            "\n\n".join(f"\b\n{part}" if part.startswith(" ") else part for part in paragraphs)
        )

    def write_dl(self, rows: Sequence[tuple[str, str]], *args: Any, **options: Any) -> None:
        cleaned = [(re.sub(r" <[^<>]+>$", "", name), _in_words(text)) for name, text in rows]
        super().write_dl([(name, text.replace("-", _HYPHEN)) for name, text in cleaned], *args, **options)

    def getvalue(self) -> str:
        text: str = super().getvalue()
        return text.replace(_HYPHEN, "-")


def _in_words(text: str) -> str:
    """Ranges as people write them: [0<=x<=9] becomes [0 to 9]."""
    number = r"(\d+)(?:\.0)?(?![\d.])"
    text = re.sub(rf"{number}<=x<={number}", r"\1 to \2", text)
    return re.sub(r"x>=(\d+(?:\.\d*[1-9])?)(?:\.0)?", r"at least \1", text)


class _WholeWords(_Context):  # type: ignore[misc]
    formatter_class = _Formatter


class Command(typer.core.TyperCommand):
    """A command with such a help text."""

    context_class = _WholeWords


class Group(typer.core.TyperGroup):
    """A group of commands with such a help text."""

    context_class = _WholeWords

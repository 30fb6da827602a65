"""Reads the pages that the project writes, for their tests."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Document(HTMLParser):
    """Checks that elements are closed in order; keeps ids, attributes and the text of scripts."""

    VOID = {"meta", "br", "link", "img", "input"}

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.title = ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.ids = [value for name, value in self.attributes if name == "id"]

    @property
    def data(self) -> Any:
        """What the first script holds, as JSON."""
        return json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        if self.open and self.open[-1] == "title":
            self.title += data

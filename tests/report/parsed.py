"""A report taken apart as a browser does it."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """A page as a browser takes it apart: what scripts there are, what is said where, which attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.scripts, self.tables, self.attributes, self.words, self.ids = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.attributes += [(tag, name, value or "") for name, value in found.items()]
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "script":
            self.scripts.append([found.get("type", ""), found.get("id", ""), ""])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack, tag
        assert self.stack.pop() == tag, (tag, self.stack[-3:])

    def handle_data(self, data):
        if not self.stack:
            return
        if self.stack[-1] == "script":
            self.scripts[-1][2] += data
        elif {"td", "th"} & set(self.stack[-1:]):
            self.tables[-1][-1][-1] += data
        elif self.stack[-1] != "style":
            self.words.append(data)

    @property
    def prompts(self):
        chunks = [text for kind, _, text in self.scripts if kind == "text/plain"]
        return [row for chunk in chunks for row in json.loads(gzip.decompress(base64.b64decode(chunk)))]

    @property
    def libraries(self):
        return [text for kind, _, text in self.scripts if kind == "text/x-library"]

    @property
    def code(self):
        return [text for kind, _, text in self.scripts if kind == ""]

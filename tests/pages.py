"""A page as its tests read it: sound markup, what a browser would fetch, and the words of each section."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input", "col"}


class ReadPage(HTMLParser):
    "Tags that open and close in order, ids, links, words, and whatever a browser would fetch."

    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.links, self.fetched, self.headings = [], [], [], [], []
        self.words, self.tags, self.parts, self.folded = {"": []}, {}, {}, set()
        self.part = ""  # id of the section that is open
        self.text = path.read_text(encoding="utf-8").replace("<wbr>", "")
        self.feed(self.text)
        assert not self.open, self.open
        assert len(self.ids) == len(set(self.ids)), "an id stands twice"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.part = attributes["id"]
            self.parts[self.part] = self.text[self._at() : self.text.index("</section>", self._at())]
        if tag == "details" and attributes.get("class") == "part":
            self.folded.add(self.part)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("src", "href"):
            if name in attributes:
                (self.links if tag == "a" else self.fetched).append(attributes[name])
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        assert not [a for a in attributes if a.startswith("on")], attributes

    def _at(self):
        "Where the parser is, as an index of the text."
        line, column = self.getpos()
        if not hasattr(self, "_lines"):
            self._lines = [0, *(m.end() for m in re.finditer("\n", self.text))]
        return self._lines[line - 1] + column

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID, tag
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()
        if tag == "section":
            self.part = ""

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.setdefault(self.part, []).append(data)

    @property
    def prose(self):
        "All words, in the order of the page."
        return " ".join(self.said(part) for part in ("", *self.parts))

    @property
    def head(self):
        "Words outside the sections: title, banners, contents, footer."
        return self.said("")

    def said(self, part):
        "The words of a section."
        return " ".join(" ".join(self.words[part]).split())

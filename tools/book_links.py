"""Checks the links of a built book: `book_links.py FOLDER`. Files, pictures and anchors must be there; other sites are not asked."""

import pathlib
import sys
import urllib.parse
from html.parser import HTMLParser


class Page(HTMLParser):
    """The links of a page, with their lines, and the names that links may lead to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.update(filter(None, [attributes.get("id"), attributes.get("name")]))
        for name in ("href", "src"):
            if attributes.get(name):
                self.links.append((self.getpos()[0], attributes[name]))


book = pathlib.Path(sys.argv[1]).resolve()
pages = {path: Page(path) for path in book.rglob("*.html")}
broken = []
for path, page in pages.items():
    # The page for addresses that do not exist names its files from the site's root.
    for line, link in page.links if path.name != "404.html" else []:
        parts = urllib.parse.urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
        if target.is_dir():
            target /= "index.html"
        anchor = urllib.parse.unquote(parts.fragment)
        inside = target.is_relative_to(book) and target.exists()
        if not inside or (anchor and target in pages and anchor not in pages[target].anchors):
            broken.append(f"{path.relative_to(book)}:{line}: {link}")
if not pages or broken:
    sys.exit("links that lead nowhere:\n" + "\n".join(broken) if pages else f"no page in {book}")
print(f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links")

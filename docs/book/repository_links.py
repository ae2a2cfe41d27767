"""A preprocessor of mdBook: `[text](../src/file.rs)`, a link to a file beside docs/, becomes the name of the file.

On a code host the pages' links lead to the files. The book is read without the repository, where they would lead nowhere.
"""

import json
import posixpath
import re
import sys

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


def as_name(match, folder):
    text, target = match.group(1), match.group(2)
    path = posixpath.normpath(posixpath.join("docs", folder, target))
    if path == "docs" or path.startswith("docs/"):
        return match.group(0)
    name = f"`{path}`"
    plain = text.strip("`")
    # The text is often the file's own name, whole or in part.
    return name if path.endswith(plain.rstrip("/")) else f"{text} ({name})"


def mend(item):
    chapter = item.get("Chapter") if isinstance(item, dict) else None
    if chapter is None:
        return
    folder = posixpath.dirname(chapter.get("path") or "")
    lines, fenced = [], False
    for line in chapter["content"].split("\n"):
        fenced ^= line.lstrip().startswith("```")
        lines.append(line if fenced else LINK.sub(lambda match: as_name(match, folder), line))
    chapter["content"] = "\n".join(lines)
    for sub_item in chapter["sub_items"]:
        mend(sub_item)


if len(sys.argv) > 2 and sys.argv[1] == "supports":
    sys.exit(0 if sys.argv[2] == "html" else 1)
_, book = json.load(sys.stdin)
for item in book["items"]:
    mend(item)
json.dump(book, sys.stdout)

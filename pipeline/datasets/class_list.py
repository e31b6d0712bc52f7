"""The file that names the classes of a data set of one's own, as people and label tools write it.

Plain text holds a name a line, in the order of the ids. What label tools write is told by its head or its form:
CVAT's labelmap.txt (`name:r,g,b:parts:actions`), labelme's labels.txt (`__ignore__` first), tables with a head
(Roboflow's `Pixel Value, Class`; `name,r,g,b`) and tables of `id, name` without one. JSON and YAML hold a list of
names; a mapping with `names` (a list, or by id as YOLO has it) and, if wanted, the other fields of `ClassList`; COCO's
`categories`; or one of Hugging Face's mappings, id to name or name to id.

What may be a head or a comment, and is none of these, is refused: taken for a name, it would shift all others by one.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError, model_validator

from pipeline.config import Section
from pipeline.config.yaml_text import parse_yaml
from pipeline.datasets.paired import decode_text, split_lines
from pipeline.datasets.raw import MAX_REASON, Colour
from pipeline.datasets.splits import first_repeated
from pipeline.datasets.tree import FileTree
from pipeline.errors import UserError
from pipeline.storage import parse_json
from segvit.image_files import IGNORE_INDEX

MAX_ID = 65535
# Columns of a table's head, as tools call them, in lower case and without spaces.
_ID_COLUMNS = ("id", "ids", "index", "value", "pixelvalue", "pixel_value", "classid", "class_id", "labelid", "label_id")
_NAME_COLUMNS = ("name", "names", "class", "classes", "label", "labels", "category", "class_name", "classname")
_COLOUR_COLUMNS = (("r", "red"), ("g", "green"), ("b", "blue"))
_LABELME_IGNORED = "__ignore__"
_IGNORED_NAMES = ("ignore", "ignored", "void", "unlabeled", "unlabelled")
_CVAT_LINE = re.compile(r"(?P<name>[^:]+):(?P<colour>\d+,\d+,\d+)?:[^:]*(:.*)?")
_ID_LINE = re.compile(r"(\d+)\s*[,;:\t]\s*(\S.*)")
_NUMBERED_LINE = re.compile(r"\d+\s+\S")


class ClassList(Section):
    """The content of a classes file.

    Attributes:
        palette: a colour a class; label maps in colour, or with a palette, are then read by it.
        ids: those in the label maps, by default 0, 1, 2, ...
        ignore_ids: ids of pixels that belong to no class.
        ignore_colours: their colours, where label maps are read by colour.
    """

    names: tuple[str, ...] = Field(min_length=1)
    palette: tuple[Colour, ...] | None = None
    ids: tuple[int, ...] | None = None
    ignore_ids: tuple[int, ...] = (IGNORE_INDEX,)
    ignore_colours: tuple[Colour, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> ClassList:
        if len(self.names) > IGNORE_INDEX:
            raise ValueError(
                f"names holds {len(self.names)} classes; label maps of 8 bits tell {IGNORE_INDEX} apart at most, as "
                f"{IGNORE_INDEX} is for ignored pixels; merge or remove classes"
            )
        if len(set(self.names)) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"names holds {', '.join(twice)} more than once; rename one")
        for name in ("palette", "ids"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.names):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.names)} names; give one a name")
        colours = (*(self.palette or ()), *self.ignore_colours)
        if any(not 0 <= level <= 255 for colour in colours for level in colour):
            raise ValueError("palette levels are 0 to 255")
        if len(set(colours)) < len(colours):
            shared = next(colour for colour in colours if colours.count(colour) > 1)
            raise ValueError(f"the colour {list(shared)} is there twice; give each class its own")
        raw = self.raw_ids()
        if any(not 0 <= number <= MAX_ID for number in (*raw, *self.ignore_ids)):
            raise ValueError(f"ids and ignore_ids are 0 to {MAX_ID}")
        if len(set(raw)) < len(raw):
            raise ValueError("ids holds an id twice; give each class its own")
        both = sorted(set(raw) & set(self.ignore_ids))
        if both:
            raise ValueError(f"ignore_ids holds {both[0]}, the id of class {self.names[raw.index(both[0])]!r}")
        return self

    def raw_ids(self) -> tuple[int, ...]:
        """The id of each class in the label maps."""
        return self.ids if self.ids is not None else tuple(range(len(self.names)))


def read_class_list(tree: FileTree, path: str) -> ClassList:
    """The classes file at `path` below the data root; raises UserError."""
    if not tree.exists():
        raise UserError(f"data root {tree.root} does not exist; set data.root to the folder with {path}")
    entry = tree.file(path)
    if entry is None:
        raise UserError(
            f"data root {tree.root} has no {path}; write one class name a line into it, in the order of their ids, "
            "or set data.folder.classes"
        )
    text = decode_text(tree.read(entry), entry.uri)
    try:
        if not path.lower().endswith((".json", ".yaml", ".yml")):
            content = _of_lines(split_lines(text, entry.uri))
        else:
            # JSON is YAML but for tabs; its own parser also says better where the mistake is.
            content = _of_tree(parse_json(text) if path.lower().endswith(".json") else parse_yaml(text))
    # What is made of a name or an id that is none, a list say.
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{entry.uri} cannot be read ({_shortened(' '.join(str(error).split()))}); correct it"
        ) from error
    return check_class_list(content, entry.uri)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."


def check_class_list(content: Any, uri: str) -> ClassList:
    """The class list of the fields in `content`, which come from `uri`; raises UserError."""
    try:
        return ClassList.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, "))))
            for item in error.errors()[:5]
        )
        raise UserError(
            f"{uri}: {_shortened(problems)}; it holds names and, if wanted, palette, ids, ignore_ids, ignore_colours"
        ) from error


def _of_tree(content: Any) -> Any:
    """The fields of `ClassList` that JSON or YAML holds, in any of the forms that are known."""
    if isinstance(content, list):
        return _of_categories(content) if content and isinstance(content[0], Mapping) else {"names": content}
    if not isinstance(content, Mapping):
        return content
    if isinstance(content.get("categories"), list):
        return _of_categories(content["categories"])
    for form in ("id2label", "label2id"):
        if isinstance(content.get(form), Mapping):
            return _by_id(content[form])
    if isinstance(content.get("names"), Mapping):
        # YOLO's data.yaml has further keys, of its own.
        return _by_id(content["names"]) | {
            name: value for name, value in content.items() if name in ClassList.model_fields and name != "names"
        }
    if isinstance(content.get("names"), list) and {"nc", "train"} & content.keys():
        return {"names": content["names"]}
    return _by_id(content) if content and not content.keys() & ClassList.model_fields.keys() else content


def _of_categories(categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """COCO's: ids, names and, where all have one, colours."""
    if not all({"id", "name"} <= category.keys() for category in categories):
        raise ValueError("a list of mappings is taken for COCO's categories, each with id and name")
    ordered = sorted(categories, key=lambda category: int(category["id"]))
    found: dict[str, Any] = {
        "names": [category["name"] for category in ordered],
        "ids": [int(category["id"]) for category in ordered],
    }
    if all("color" in category for category in ordered):
        found["palette"] = [category["color"] for category in ordered]
    return found


def _by_id(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    """Id to name, or name to id."""
    for pairs in (mapping.items(), [(value, key) for key, value in mapping.items()]):
        if all(str(number).isdigit() and isinstance(name, str) and not name.isdigit() for number, name in pairs):
            return _numbered({int(number): name for number, name in pairs})
    raise ValueError("a mapping holds names (with palette, ids, ignore_ids), id2label, or a name by id")


def _numbered(names: Mapping[int, str]) -> dict[str, Any]:
    """Names by id, with ids only where they are not 0, 1, 2, ...; 255 may only be named as what is ignored.

    Raises ValueError for a class with that id: to leave it out in silence would lose it.
    """
    ignored = names.get(IGNORE_INDEX, "ignore").strip().lower().strip("_")
    if ignored not in _IGNORED_NAMES:
        raise ValueError(
            f"{IGNORE_INDEX} is the id of ignored pixels, and of {ignored!r} here; where it is a class, write "
            "names, ids and ignore_ids: [] as JSON or YAML"
        )
    known = {number: name for number, name in names.items() if number != IGNORE_INDEX}
    ids = sorted(known)
    found: dict[str, Any] = {"names": [known[number].strip() for number in ids]}
    return found if ids == list(range(len(ids))) else found | {"ids": ids}


def _of_lines(lines: Sequence[str]) -> dict[str, Any]:
    """The fields of `ClassList` that a text file's lines hold."""
    if lines and lines[0].startswith("#") and "label:" in lines[0].replace(" ", ""):
        return _of_cvat(lines[1:])
    for line in lines:
        if line.startswith("#"):
            raise ValueError(f"{line!r} looks like a comment, and would be a class; remove it")
    if lines and all(_CVAT_LINE.fullmatch(line) for line in lines):
        return _of_cvat(lines)
    if lines and "," in lines[0]:
        table = _of_table(lines)
        if table is not None:
            return table
    if lines and (pairs := [_ID_LINE.fullmatch(line) for line in lines]) and all(pairs):
        return _numbered(_distinct([(int(pair[1]), pair[2]) for pair in pairs if pair]))
    if lines and lines[0] == _LABELME_IGNORED:
        # labelme gives it -1, which its label maps hold as 255.
        lines = lines[1:]
    if lines and lines[0].lower().replace(" ", "") in (*_ID_COLUMNS, *_NAME_COLUMNS) and len(lines) > 1:
        raise ValueError(f"{lines[0]!r} looks like the head of a table, and would be class 0; remove the line")
    if len(lines) > 1 and all(_NUMBERED_LINE.match(line) for line in lines):
        raise ValueError(f"{lines[0]!r} may be an id and a name, or a name; write `id, name`, or names alone")
    return {"names": list(lines)}


def _of_cvat(lines: Sequence[str]) -> dict[str, Any]:
    """`name:r,g,b:parts:actions`; labels of tools without a colour would all be black, so all have one or none."""
    found = [_CVAT_LINE.fullmatch(line) for line in lines]
    for line, match in zip(lines, found, strict=True):
        if match is None:
            raise ValueError(f"{line!r} is not name:r,g,b:parts:actions, as labelmap.txt has it")
    matches = [match for match in found if match is not None]
    colours = [match["colour"] for match in matches if match["colour"]]
    names: dict[str, Any] = {"names": [match["name"].strip() for match in matches]}
    if not colours:
        return names
    if len(colours) < len(matches):
        raise ValueError("some labels have a colour and some have none; give each its own")
    return names | {"palette": [[int(level) for level in colour.split(",")] for colour in colours]}


def _of_table(lines: Sequence[str]) -> dict[str, Any] | None:
    """A table with a head of known columns; None where there is no such head."""
    head = [cell.strip().lower().replace(" ", "") for cell in next(csv.reader([lines[0]]))]
    name = next((head.index(column) for column in _NAME_COLUMNS if column in head), None)
    number = next((head.index(column) for column in _ID_COLUMNS if column in head), None)
    colours = [next((head.index(one) for one in ones if one in head), None) for ones in _COLOUR_COLUMNS]
    if name is None or (number is None and None in colours):
        return None
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines[1:], skipinitialspace=True)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"the line {', '.join(row)!r} has {len(row)} columns, the head {len(head)}")
    ordered = rows if number is None else sorted(rows, key=lambda row: int(row[number]))
    found: dict[str, Any] = {"names": [row[name] for row in ordered]}
    if number is not None:
        found = _numbered(_distinct([(int(row[number]), row[name]) for row in ordered]))
    if None not in colours:
        kept = ordered if number is None else [row for row in ordered if int(row[number]) != IGNORE_INDEX]
        found["palette"] = [[int(row[column]) for column in colours if column is not None] for row in kept]
    return found


def _distinct(pairs: Sequence[tuple[int, str]]) -> dict[int, str]:
    names = dict(pairs)
    if len(names) < len(pairs):
        twice = first_repeated(number for number, _ in pairs)
        raise ValueError(f"id {twice} is there twice; give each class its own")
    return names

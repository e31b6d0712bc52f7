"""Classes files as people and label tools write them: the right names at the right ids, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.datasets.class_list import ClassList, read_class_list
from pipeline.datasets.tree import FileTree
from pipeline.errors import UserError


def read(root: Path, name: str, text: str) -> ClassList:
    (root / name).write_text(text, encoding="utf-8")
    return read_class_list(FileTree(str(root)), name)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("classes.txt", "sky\r\n\n  road \n", {"names": ("sky", "road")}),
        ("classes.txt", "class\n", {"names": ("class",)}),
        ("_classes.csv", "Pixel Value, Class\n0, background\n1, object\n", {"names": ("background", "object")}),
        (
            "_classes.csv",
            "Pixel Value, Class\n1, cat\n0, none\n4, dog\n",
            {"names": ("none", "cat", "dog"), "ids": (0, 1, 4)},
        ),
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad sign:128,0,0:post,face:\n",
            {"names": ("background", "road sign"), "palette": ((0, 0, 0), (128, 0, 0))},
        ),
        ("labelmap.txt", "background:::\nroad:::\n", {"names": ("background", "road")}),
        ("labels.txt", "__ignore__\n_background_\nobject\n", {"names": ("_background_", "object")}),
        (
            "class_dict.csv",
            'name,r,g,b\n"pole, thin",1,2,3\nroad,4,5,6\n',
            {"names": ("pole, thin", "road"), "palette": ((1, 2, 3), (4, 5, 6))},
        ),
        (
            "classes.csv",
            "id,name,red,green,blue\n2,b,4,5,6\n0,a,1,2,3\n255,void,9,9,9\n",
            {"names": ("a", "b"), "ids": (0, 2), "palette": ((1, 2, 3), (4, 5, 6))},
        ),
        ("classes.txt", "0: sky\n1: road\n", {"names": ("sky", "road")}),
        ("classes.txt", "1,sky\n2,road\n", {"names": ("sky", "road"), "ids": (1, 2)}),
        ("classes.json", '["sky", "road"]', {"names": ("sky", "road")}),
        ("classes.json", '{"0": "sky", "1": "road"}', {"names": ("sky", "road")}),
        (
            "id2label.json",
            '{"0": "sky", "10": "road", "2": "car"}',
            {"names": ("sky", "car", "road"), "ids": (0, 2, 10)},
        ),
        ("config.json", '{"id2label": {"0": "sky", "1": "road"}, "hidden": 3}', {"names": ("sky", "road")}),
        ("label2id.json", '{"road": 1, "sky": 0}', {"names": ("sky", "road")}),
        ("data.yaml", "path: x\ntrain: images/train\nnc: 2\nnames: [sky, road]\n", {"names": ("sky", "road")}),
        ("data.yaml", "train: images/train\nnames:\n  0: sky\n  1: road\n", {"names": ("sky", "road")}),
        (
            "coco.json",
            '{"images": [], "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a", "supercategory": "x"}]}',
            {"names": ("a", "b"), "ids": (3, 7)},
        ),
        (
            "panoptic.json",
            '[{"id": 1, "name": "a", "color": [1, 2, 3]}, {"id": 2, "name": "b", "color": [4, 5, 6]}]',
            {"names": ("a", "b"), "ids": (1, 2), "palette": ((1, 2, 3), (4, 5, 6))},
        ),
        (
            "classes.yaml",
            "names: [a]\npalette: [[1, 2, 3]]\nids: [4]\nignore_ids: [0]\nignore_colours: [[0, 0, 0]]\n",
            {"names": ("a",), "palette": ((1, 2, 3),), "ids": (4,), "ignore_ids": (0,), "ignore_colours": ((0, 0, 0),)},
        ),
    ],
)
def test_read_class_list__as_tools_write_it(tmp_path: Path, name: str, text: str, wanted: dict[str, Any]) -> None:
    assert read(tmp_path, name, text) == ClassList(**wanted)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("classes.txt", "Classes\nsky\nroad\n", "'Classes' looks like the head of a table, and would be class 0"),
        ("classes.txt", "# my classes\nsky\n", "'# my classes' looks like a comment, and would be a class; remove it"),
        ("classes.txt", "0 sky\n1 road\n", "'0 sky' may be an id and a name, or a name; write `id, name`"),
        ("classes.txt", "0: sky\n0: road\n", "id 0 is there twice; give each class its own"),
        (
            "_classes.csv",
            "Pixel Value, Class\n0, background\n255, object\n",
            "255 is .*, and of 'object' here; where it",
        ),
        ("data.yaml", "names: {0: background, 255: object}\n", "255 is .*, and of 'object' here; where it is a class"),
        ("classes.csv", "id,name\n0,sky,blue\n", "the line '0, sky, blue' has 3 columns, the head 2"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad\n", "'road' is not name:r,g,b:parts:actions"),
        ("labelmap.txt", "a:1,2,3::\nb:::\n", "some labels have a colour and some have none"),
        ("labelmap.txt", "a:1,2,3::\nb:1,2,3::\n", r"the colour \[1, 2, 3\] is there twice; give each class its own"),
        ("classes.json", '{"a": "b"}', "a mapping holds names"),
        ("classes.json", '[{"name": "a"}]', "a list of mappings is taken for COCO's categories, each with id and name"),
        ("classes.json", '{"names": ["a"], "ignore_colours": [[0, 0, 256]]}', "palette levels are 0 to 255"),
    ],
)
def test_read_class_list__what_would_shift_names_is_refused(tmp_path: Path, name: str, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        read(tmp_path, name, text)
    assert name in str(refused.value)

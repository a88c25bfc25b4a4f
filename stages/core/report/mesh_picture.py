"""The device mesh as a grid in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.core.report.axes import Tick

# A mesh axis longer than this is drawn as its beginning and its end.
MOST_DRAWN = 16


@dataclass(frozen=True)
class Cell:
    """A device of the mesh, drawn at (`x`, `y`) in pixels."""

    x: int
    y: int
    number: int


@dataclass(frozen=True)
class MeshPicture:
    """The mesh as a grid in pixels: cells, the numbers along both axes (or a gap), and what was left out."""

    rows: int
    columns: int
    row_axis: str
    column_axis: str
    cells: list[Cell]
    row_labels: list[Tick]
    column_labels: list[Tick]
    cell: int
    left: int
    top: int
    width: int
    height: int
    summarised: bool


def mesh_picture(shape: Sequence[int], axis_names: Sequence[str]) -> MeshPicture:
    """Lay out a mesh of one or two axes as a grid, the first axis downwards; a long axis is shortened in the middle.

    The number in a cell is the device's place in the mesh, counted row by row.
    """
    rows, columns = (1, *shape)[-2:]
    names = ("", *axis_names)[-2:]
    # 16 columns of the smaller cells fit next to the memory chart; numbers of three digits fit into them.
    cell, gap = (26, 3) if 8 < columns <= MOST_DRAWN else (34, 4)
    left, top = 38, 46

    def places(count: int) -> list[int | None]:
        if count <= MOST_DRAWN:
            return list(range(count))
        return [*range(6), None, count - 2, count - 1]

    drawn_rows, drawn_columns = places(rows), places(columns)
    cells = [
        Cell(left + i * (cell + gap), top + j * (cell + gap), row * columns + column)
        for j, row in enumerate(drawn_rows)
        for i, column in enumerate(drawn_columns)
        if row is not None and column is not None
    ]

    def labels(drawn: list[int | None], start: int) -> list[Tick]:
        return [
            Tick(start + index * (cell + gap) + cell // 2, "\N{MIDLINE HORIZONTAL ELLIPSIS}" if n is None else f"{n}")
            for index, n in enumerate(drawn)
        ]

    return MeshPicture(
        rows=rows,
        columns=columns,
        row_axis=names[0],
        column_axis=names[1],
        cells=cells,
        row_labels=labels(drawn_rows, top),
        column_labels=labels(drawn_columns, left),
        cell=cell,
        left=left,
        top=top,
        width=left + len(drawn_columns) * (cell + gap),
        height=top + len(drawn_rows) * (cell + gap),
        summarised=None in drawn_rows or None in drawn_columns,
    )

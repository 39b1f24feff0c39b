"""Curves of a run that is under way, in a notebook."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = ("reward/responses", "eval/pass@1", "refine/success", "policy/entropy")
DPI = 80


class Curves:
    """Redraws metrics in place as they come: `cgrpo_jax.train(config, workdir, on_step=Curves())`.

    Outside a notebook it shows nothing. A metric without a value has no plot.

    Args:
      names: of metrics, one plot each.
    """

    def __init__(self, names: Sequence[str] = SHOWN):
        self.names, self.place = tuple(names), None
        self.drawn = ""  # how answers of evaluations are sampled, in the words of `options.drawn`
        self.points: dict[str, list[tuple[int, float]]] = {name: [] for name in self.names}

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes a row of metrics without drawing."""
        for name in self.names:
            if row.get(name) is not None:
                self.points[name].append((row["step"], row[name]))

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Takes a row of metrics and draws."""
        self.add(row)
        self.draw()

    def figure(self) -> Any:
        """The plots, a matplotlib figure; None where nothing was measured yet."""
        from matplotlib.figure import Figure

        known = [name for name in self.names if self.points[name]]
        if not known:
            return None
        figure = Figure(figsize=(3.4 * len(known), 2.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
            steps, values = zip(*self.points[name], strict=True)
            axes.plot(steps, values, marker=".", linewidth=1.2)
            axes.set_title(f"{name}, {self.drawn}" if self.drawn and "pass@1" in name else name, fontsize=10)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        return figure

    def draw(self) -> None:
        """Shows the figure in place of the last one."""
        try:
            from IPython import get_ipython
            from IPython.display import Image, display
        except ModuleNotFoundError:  # no notebook
            return
        figure = None if get_ipython() is None else self.figure()
        if figure is None:
            return
        png = io.BytesIO()  # a notebook without %matplotlib shows a figure as text
        figure.savefig(png, format="png", dpi=DPI)
        picture = Image(png.getvalue(), format="png", alt=", ".join(name for name in self.names if self.points[name]))
        if self.place is None:
            self.place = display(picture, display_id=True)
        else:
            self.place.update(picture)

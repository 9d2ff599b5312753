"""Figures that matplotlib draws, as inline SVG which can do nothing but be seen."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

from abft_mlx.analysis.figures import style
from abft_mlx.analysis.plotting import Plot
from abft_mlx.analysis.report.html import Markup, element, join
from abft_mlx.analysis.report.page import Section, notes

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_DRAWN = frozenset(
    {"svg", "g", "defs", "path", "rect", "circle", "line", "polyline", "polygon", "text", "tspan"}
    | {"use", "clipPath", "image", "linearGradient", "radialGradient", "stop", "pattern", "marker"}
)
_KEPT = frozenset(
    {"style", "transform", "d", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "rx", "ry"}
    | {"width", "height", "points", "clip-path", "fill", "stroke", "viewBox", "offset"}
    | {"gradientUnits", "gradientTransform", "patternUnits", "preserveAspectRatio"}
)
_ROOM = 'stroke-linejoin="round" stroke-linecap="butt"'


def drawn(plots: Sequence[Plot], tell: Callable[[str], None] = lambda _line: None) -> Markup:
    """Figures one below the other, each with its caption.

    Args:
        plots: what to draw.
        tell: told of each figure before it is drawn.
    """
    made = []
    for n, one in enumerate(plots, 1):
        tell(f"drawing {one.stem} ({n} of {len(plots)})")
        made.append(figure(one))
    return join(*made)


def section(drawings: Markup, untold: Sequence[str]) -> list[Section]:
    """The page's section of figures, and of why some are not there; none where there is neither."""
    if not drawings and not untold:
        return []
    told = notes([f"Not here: {one}." for one in untold])
    return [Section("figures", "Figures", join(drawings, told))]


def figure(plot: Plot) -> Markup:
    """One figure, drawn now."""
    picture = sanitised(_svg(plot), plot.stem)
    return element(
        "figure",
        element(
            "div", picture, class_="wide paper", tabindex="0", role="region",
            aria_label=f"figure {plot.stem}",
        ),
        element("figcaption", element("b", plot.stem.replace("-", " ")), f": {plot.caption}"),
        class_="panel drawn",
        id=f"figure-{plot.stem}",
    )  # fmt: skip


def _svg(plot: Plot) -> bytes:
    out = io.BytesIO()
    with style.look():
        height = None if plot.height is None else plot.height(style.WIDTHS["page"])
        drawn_ = style.framed(plot.draw, "", height=height)
        drawn_.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def sanitised(svg: bytes, name: str) -> Markup:
    """An SVG with nothing in it but shapes and text, and ids that are its own in the page.

    Args:
        svg: a document.
        name: the figure's; its ids begin with what is made from it.
    """
    root = ElementTree.fromstring(svg)
    prefix = f"f{hashlib.sha256(name.encode()).hexdigest()[:8]}-"
    _clean(root, prefix)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    text = ElementTree.tostring(root, encoding="unicode")
    return Markup(text.replace("<svg ", f'<svg role="img" {_ROOM} ', 1))


def _clean(node: ElementTree.Element, prefix: str) -> None:
    for child in list(node):
        if child.tag.removeprefix(f"{{{_SVG}}}") not in _DRAWN:
            node.remove(child)
        else:
            _clean(child, prefix)
    for key, value in list(node.attrib.items()):
        name = key.removeprefix(f"{{{_XLINK}}}")
        if name == "href":
            good = value.startswith("#") or value.startswith("data:image/png;base64,")
            if good:
                node.attrib[key] = f"#{prefix}{value[1:]}" if value.startswith("#") else value
                continue
        if key == "id":
            node.attrib[key] = prefix + value
        elif key in _KEPT:
            local = re.sub(r"url\(#", f"url(#{prefix}", value)
            # Whatever is not of this picture is not fetched.
            node.attrib[key] = re.sub(r"url\((?!#)[^)]*\)", "none", local)
        else:
            del node.attrib[key]

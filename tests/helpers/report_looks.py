"""What the report's tests look at: the page as a tree, and the texts of a figure with where they lie."""

from html.parser import HTMLParser

from matplotlib.backends.backend_agg import FigureCanvasAgg

from trl_cpo.report import style


class Page(HTMLParser):
    """Tags as a tree is built of them, and the visible text; a tag that is closed in the wrong place fails."""

    VOID = {"meta", "img", "br", "hr", "link", "input", "source"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def drawn_figure(kind, runs, shape=style.WIDE):
    with style.drawing(shape):
        figure, notes = kind.draw(runs)
        figure.draw_without_rendering()
    return figure, notes


def texts_of(figure) -> list[tuple[str, object]]:
    """Every text that is to be seen, with where it lies in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    found = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found.append(axis.get_offset_text())
    return [
        (text.get_text(), text.get_window_extent(renderer)) for text in found if text.get_visible() and text.get_text().strip()
    ]

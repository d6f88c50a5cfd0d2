"""The picture at the top of README.md: what is computed for four preferences about one prompt, both ways.

python docs/idea.py     draw docs/idea-light.svg and docs/idea-dark.svg

Lengths are to scale. They are those of the benchmark's longest pairs (bench/training/shapes.py): an image of 1,200
tokens, a question of 100, and responses of 300.
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parent
IMAGE, QUESTION, RESPONSE = 1200, 100, 300
RESPONSES = "ABCD"
PAIRS = ("AC", "AD", "BC", "BD")  # better, worse
ROWS = [response for pair in PAIRS for response in pair]
PAIRWISE_TOKENS = len(ROWS) * (IMAGE + QUESTION + RESPONSE)
TREE_TOKENS = IMAGE + QUESTION + len(RESPONSES) * RESPONSE

# text, quiet text, image, question, responses; on white and on GitHub's dark background (#0d1117).
THEMES = {
    "light": ("#1f2328", "#59636e", "#7aa7e0", "#c8b6ee", ("#7fcf9a", "#a9dcae", "#f2b489", "#f6cfae")),
    "dark": ("#f0f6fc", "#a3adb8", "#2f5fa3", "#6b52a8", ("#23793f", "#37613c", "#a3541f", "#7d4c2a")),
}


def draw(theme: str) -> Figure:
    """Return the picture for one background, which stays transparent."""
    text, quiet, image, question, responses = THEMES[theme]
    colours = dict(zip(RESPONSES, responses, strict=True))
    figure = Figure(figsize=(9.6, 4.7))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(-190, 2540), ylim=(-4.6, 12.1))
    axes.set_axis_off()

    def block(left: float, bottom: float, width: float, colour: str, label: str, height: float = 0.8, **style):
        axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, edgecolor="none"))
        axes.text(left + width / 2, bottom + height / 2 - 0.03, label, ha="center", va="center", color=text, **style)

    def prompt(bottom: float, **style):
        block(0, bottom, IMAGE - 8, image, "image", **style)
        block(IMAGE, bottom, QUESTION - 8, question, "Q", **style)

    axes.text(-160, 11.2, "Pairwise trainers: every pair is two rows", fontsize=13, weight="bold", color=text)
    for number, response in enumerate(ROWS):
        bottom = 9.7 - number - 0.25 * (number // 2)
        prompt(bottom, fontsize=9)
        block(IMAGE + QUESTION, bottom, RESPONSE - 8, colours[response], response, fontsize=9)
        if number % 2 == 0:
            axes.text(
                -30, bottom - 0.1, " > ".join(PAIRS[number // 2]), ha="right", va="center", fontsize=10, color=quiet
            )
    lengths = f"image {IMAGE:,} tokens, question Q {QUESTION}, a response {RESPONSE}"
    axes.text(2510, 11.2, lengths, ha="right", fontsize=10.5, color=quiet)
    axes.text(1690, 6.9, f"{PAIRWISE_TOKENS:,} tokens", fontsize=21, weight="bold", color=text)
    axes.text(1690, 5.6, f"the image encoded {len(ROWS)} times", fontsize=12, color=quiet)

    axes.text(-160, 0.2, "fastrm: one prompt tree, packed into one row", fontsize=13, weight="bold", color=text)
    prompt(-2.6, height=1.3, fontsize=11)
    left = IMAGE + QUESTION
    for response in RESPONSES:
        block(left, -2.6, RESPONSE - 8, colours[response], response, height=1.3, fontsize=11)
        middle = left + RESPONSE / 2  # each response reads the prompt and itself
        start = IMAGE + QUESTION / 2
        axes.plot([start, start, middle, middle], [-1.25, -0.75, -0.75, -1.25], color=quiet, linewidth=1.2)
        left += RESPONSE
    axes.text(0, -4.05, f"{TREE_TOKENS:,} tokens", fontsize=21, weight="bold", color=text)
    axes.text(
        760,
        -4.05,
        "the image encoded once; the same loss and gradient",
        fontsize=12,
        color=quiet,
    )
    return figure


def main():
    # Letters as outlines, since a viewer may lack the font; names inside the file do not change from run to run.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "fastrm"}):
        for theme in THEMES:
            file = FOLDER / f"idea-{theme}.svg"
            draw(theme).savefig(file, transparent=True, metadata={"Date": None})
            print(f"wrote {file}")


if __name__ == "__main__":
    main()

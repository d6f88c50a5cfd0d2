"""The pictures of reports in docs: rows of the digits as a page, and the quick start's model on them.

python docs/report_pages.py [MODEL]     draw data_show.png and eval_report.png with Chromium, by the model of a run
"""

import io
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from PIL import Image  # noqa: E402

from fastrm.evaluate.files import evaluate_file  # noqa: E402
from fastrm.evaluate.options import ModelChoice, Outputs, ScoringOptions  # noqa: E402
from fastrm.train.show_command import show_data  # noqa: E402
from tests.helpers.browser import Browser  # noqa: E402

MODEL = "runs/quickstart/model"


def draw(page: Path, name: str, height: int, width: int = 1000) -> None:
    """Draw the upper part of a page as a PNG of docs, in 64 colours."""
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(Path(folder))
        try:
            browser.resize(width)
            browser.open(page.as_uri())
            image = Image.open(io.BytesIO(browser.picture())).convert("RGB")
            upper = image.crop((0, 0, width, min(height, image.height)))
            upper.quantize(64).save(Path(__file__).with_name(name), optimize=True)
        finally:
            browser.close()


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else MODEL
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "rows.html"
        show_data("digits:eval", model=model, reading={}, count=3, out=page)
        draw(page, "data_show.png", 1500)
        page = Path(folder) / "report.html"
        options = ScoringOptions(num_workers=0, device="cpu")
        evaluate_file(ModelChoice((Path(model),)), "digits:eval", Outputs(report=page), options)
        draw(page, "eval_report.png", 1500, width=1160)


if __name__ == "__main__":
    main()

"""The picture of the server's page in docs/serving.md: the quick start's model on a scanned digit.

python docs/serve_page.py [MODEL]     draw docs/serve_page.png; needs Chromium, and the model of `make quickstart`
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from fastrm.data.sources.digits import digit_records  # noqa: E402
from fastrm.evaluate.ensemble import Ensemble  # noqa: E402
from fastrm.evaluate.reward_model import RewardModel  # noqa: E402
from fastrm.serve.app import make_app  # noqa: E402
from fastrm.serve.scheduler import Scheduler  # noqa: E402
from fastrm.serve.scorer import Scorer  # noqa: E402
from fastrm.serve.settings import ServeSettings  # noqa: E402
from tests.helpers.browser import Browser  # noqa: E402
from tests.helpers.servers import running  # noqa: E402

MODEL = "runs/quickstart/model"
PROMPT = "Which digit is shown?"
ANSWERS = ("eight", "zero", "six", "nine")


def draw(model: RewardModel, width: int, dark: bool = False) -> bytes:
    """Return the page as a PNG after it has scored a digit of the eval split, which no training has seen."""
    record = next(record for record in digit_records("eval") if record.responses[0].media)
    scheduler = Scheduler([Scorer(MODEL, Ensemble([model]), 8192)])
    with tempfile.TemporaryDirectory() as folder, running(make_app(scheduler, ServeSettings())) as url:
        image = Path(folder) / "digit.png"
        image.write_bytes(record.responses[0].media[0].data)
        (Path(folder) / "browser").mkdir()
        browser = Browser(Path(folder) / "browser")
        try:
            browser.resize(width, dark=dark)
            browser.open(f"{url}/")
            browser.drop(image, "#drop")
            browser.wait_for("document.querySelector('#thumbnails img')?.complete")
            _fill_in(browser)
            return browser.picture()
        finally:
            browser.close()


def _fill_in(browser: Browser) -> None:
    for _ in range(len(ANSWERS) - 2):
        browser.evaluate("document.getElementById('add').click()")
    for name, text in [("prompt", PROMPT), *((f"answer-{n}", text) for n, text in enumerate(ANSWERS, 1))]:
        browser.evaluate(f"document.getElementById('{name}').focus()")
        browser.type(text)
    browser.press("Enter", control=True)
    browser.wait_for("document.querySelectorAll('#ranking li').length && document.querySelector('#recent td + td')")
    browser.evaluate("document.activeElement.blur()")


def main() -> None:
    model = RewardModel.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else MODEL, device="cpu")
    Path(__file__).with_name("serve_page.png").write_bytes(draw(model, 1200))


if __name__ == "__main__":
    main()

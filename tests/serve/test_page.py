"""The page at `/`, in a real browser: what a reader types, drops and reads, against what the model says."""

import json
import subprocess
import sys

import pytest

from fastrm.evaluate.ensemble import Ensemble
from fastrm.serve.app import make_app
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.servers import running
from tests.helpers.support import make_image
from tests.helpers.waiting import PATIENCE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

# What shells, Python, JSON and HTML read in another way than it is meant.
NASTY = "it's \"$HOME\" `id` \\n {0} <b>é</b> 数\\"
ROUNDING = 1e-6  # the server may compute a group in company (docs/serving.md)
DONE = "!document.getElementById('score').disabled"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def url(model):
    scheduler = Scheduler([Scorer("runs/my/model", Ensemble([model]), 8192)])
    with running(make_app(scheduler, ServeSettings())) as url:
        yield url


@pytest.fixture
def page(browser, url):
    browser.resize(1200)
    browser.open(f"{url}/")
    yield browser
    assert not browser.faults
    assert browser.asked and all(asked.startswith((url, "data:")) for asked in browser.asked)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "it's a picture.png"
    path.write_bytes(make_image(84, 56, seed=9).data)
    return path


def tab_to(page, selector):
    """Press Tab until an element has the focus; it must be reachable so."""
    for _ in range(60):
        if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
            return
        page.press("Tab")
    raise AssertionError(f"Tab never came to {selector}")


def fill_in(page, prompt, answers):
    """Write a prompt and answers and ask for their rewards, by keys alone."""
    tab_to(page, "#prompt")
    page.type(prompt)
    for number, answer in enumerate(answers, 1):
        if number > 2:
            tab_to(page, "#add")
            page.press("Enter")  # which puts the focus into the new answer
        else:
            tab_to(page, f"#answer-{number}")
        page.type(answer)
    page.press("Enter", control=True)
    page.wait_for(f"{DONE} && !document.getElementById('summary').textContent.startsWith('Write')")


def drop(page, image):
    page.drop(image, "#drop")
    page.wait_for("document.querySelector('#thumbnails img')")


def ranking(page):
    """The answers and rewards that are shown, from the best to the last."""
    shown = "[...document.querySelectorAll('#ranking > li')].map((item) => [item.querySelector('.answer').textContent, "
    return page.evaluate(shown + "Number(item.dataset.reward), item.querySelector('.reward').firstChild.textContent])")


def text(page, name):
    return page.evaluate(f"document.getElementById({json.dumps(name)}).textContent")


def test_rewards_are_the_models_and_the_best_comes_first(page, image, model):
    answers = ["red", NASTY, "a blue dog", "<script>document.title = 'run'</script>"]
    drop(page, image)
    fill_in(page, "the cat", answers)
    ((*wanted,),) = model.score([{"prompt": "the cat", "images": [str(image)], "responses": answers}])
    best_first = sorted(zip(answers, wanted, strict=True), key=lambda pair: -pair[1])
    shown = ranking(page)
    assert [answer for answer, *_ in shown] == [answer for answer, _ in best_first]
    assert [reward for _, reward, _ in shown] == pytest.approx([reward for _, reward in best_first], abs=ROUNDING)
    assert [figure for *_, figure in shown] == [f"{reward:.3f}".replace("-", "\u2212") for _, reward, _ in shown]
    assert page.evaluate("document.title") == "fastrm"
    assert text(page, "summary").startswith(f"Answer {answers.index(best_first[0][0]) + 1} is best")


@pytest.mark.parametrize("answers", [["yes", "no", "perhaps", "a red cat"], ["yes", "yes"]], ids=["spread", "equal"])
def test_a_bar_lacks_what_its_reward_lies_behind_the_best(page, answers):
    fill_in(page, "Is it?", answers)
    bars = "[...document.querySelectorAll('#ranking rect')].map((bar) => bar.width.baseVal.value)"
    rewards = [reward for _, reward, _ in ranking(page)]
    span = max(1, max(rewards) - min(rewards))
    wanted = [100 - 97 * (max(rewards) - reward) / span for reward in rewards]
    assert page.evaluate(bars) == pytest.approx(wanted, abs=1e-4)


def test_equal_rewards_share_a_rank(page):
    fill_in(page, "Is it?", ["no", "yes", "yes"])
    ranks = page.evaluate("[...document.querySelectorAll('#ranking .rank')].map((rank) => rank.textContent)")
    assert ranks in (["1.", "1.", "3."], ["1.", "2.", "2."])


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
def test_curl_and_python_to_copy_give_the_same_rewards(page, image, model, with_image):
    if with_image:
        drop(page, image)
    answers = [NASTY, "no"]
    fill_in(page, NASTY, answers)
    group = {"prompt": NASTY, "images": [str(image)] * with_image, "responses": answers}
    wanted = pytest.approx(model.score([group])[0], abs=ROUNDING)
    commands = (["bash", "-c", text(page, "curl")], [sys.executable, "-c", text(page, "python")])
    by_curl, by_python = (
        subprocess.run(command, cwd=image.parent, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
        for command in commands
    )
    assert json.loads(by_curl)["rewards"][0] == wanted and json.loads(by_python) == wanted


def test_answers_are_two_to_eight(page):
    count = "document.querySelectorAll('#answers textarea').length"
    for _ in range(6):
        tab_to(page, "#add")
        page.press("Space")
    assert page.evaluate(count) == 8 and page.evaluate("document.getElementById('add').hidden")
    for number in range(8, 2, -1):
        tab_to(page, f"[aria-label='Remove answer {number}']")
        page.press("Enter")
    assert page.evaluate(count) == 2
    assert page.evaluate("[...document.querySelectorAll('#answers button')].every((button) => button.hidden)")


def test_an_image_can_be_taken_away_again(page, image):
    drop(page, image)
    tab_to(page, "[aria-label^='Remove image']")
    page.press("Enter")
    assert page.evaluate("document.querySelectorAll('#thumbnails li').length") == 0
    assert page.evaluate("document.activeElement.id") == "files"


def test_what_is_wrong_is_said_in_words(page, tmp_path):
    page.press("Enter", control=True)
    assert text(page, "error") == "The prompt is empty."
    tab_to(page, "#prompt")
    page.type("Is it?")
    page.press("Enter", control=True)
    assert text(page, "error") == "Answer 1 is empty." and page.evaluate("document.activeElement.id") == "answer-1"
    no_image = tmp_path / "notes.txt"
    no_image.write_text("words")
    page.drop(no_image, "#drop")
    page.wait_for("document.getElementById('error').textContent === 'notes.txt is not an image.'")


def test_an_image_that_is_none_is_refused_by_the_server_in_words(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    drop(page, broken)
    fill_in(page, "Which?", ["one", "two"])
    assert "image" in text(page, "error") and "{" not in text(page, "error")
    assert not ranking(page) and text(page, "summary") == "No rewards."


def answer_with(status, headers, body):
    """A replacement of the browser's fetch that answers every request so."""
    return f"void (fetch = async () => new Response({body!r}, {{status: {status}, headers: {json.dumps(headers)}}}))"


@pytest.mark.parametrize(
    "fetch, said",
    [
        (
            answer_with(503, {"Retry-After": "3"}, '{"error": {"message": "64 requests wait", "code": "OVERLOADED"}}'),
            "The server has too much to do. Try again in 3 s. It says: 64 requests wait (OVERLOADED)",
        ),
        (answer_with(413, {}, '{"error": {"message": "too large", "code": "TOO_LARGE"}}'), "too large (TOO_LARGE)"),
        (answer_with(500, {}, "<html>"), "The server answered with status 500 and no reason."),
        (answer_with(401, {}, "{}"), "The server wants a token."),
        (
            "void (fetch = async () => { throw new TypeError('Failed to fetch'); })",
            "The server does not answer. Is it still running, and is the network there?",
        ),
    ],
    ids=["overload", "too large", "not JSON", "token", "gone"],
)
def test_refusals_are_said_in_words(page, fetch, said):
    page.evaluate(fetch)
    fill_in(page, "Is it?", ["yes", "no"])
    assert text(page, "error") == said and text(page, "summary") == "No rewards."
    assert page.evaluate("document.getElementById('token-row').hidden") == ("token" not in said)


def test_a_token_is_asked_for_kept_for_the_tab_and_never_shown(browser, model):
    scheduler = Scheduler([Scorer("runs/my/model", Ensemble([model]), 8192)])
    with running(make_app(scheduler, ServeSettings(token="a-secret"))) as url:
        browser.open(f"{url}/")
        browser.wait_for("document.getElementById('model').textContent === 'The server wants a token.'")
        for token, wanted in (("wrong", "The server refuses this token."), ("a-secret", "runs/my/model")):
            tab_to(browser, "#token")
            browser.evaluate("document.getElementById('token').select()")
            browser.type(token)
            browser.press("Tab")
            browser.wait_for(f"document.getElementById('model').textContent === {json.dumps(wanted)}")
        fill_in(browser, "Is it?", ["yes", "no"])
        wanted = sorted(model.score([{"prompt": "Is it?", "responses": ["yes", "no"]}])[0], reverse=True)
        assert [reward for _, reward, _ in ranking(browser)] == pytest.approx(wanted, abs=ROUNDING)
        assert "$FASTRM_TOKEN" in text(browser, "curl") and "FASTRM_TOKEN" in text(browser, "python")
        assert "a-secret" not in browser.evaluate("document.body.innerHTML")
        browser.open(f"{url}/?again")
        browser.wait_for("document.getElementById('model').textContent === 'runs/my/model'")


def test_what_the_server_does_is_shown(page):
    page.wait_for("document.getElementById('model').textContent === 'runs/my/model'")
    fill_in(page, "Is it?", ["yes", "no", "so"])
    row = "[...document.querySelectorAll('#recent tr:first-child td')].slice(1, 4).map((cell) => cell.textContent)"
    page.wait_for(f"String({row}) === '/v1/rewards,200,3'")
    assert text(page, "waiting") == "0" and float(text(page, "rate")) > 0
    assert text(page, "p50").endswith(" ms") and text(page, "p99").endswith(" ms")


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(page, image, width):
    page.resize(width)
    drop(page, image)
    fill_in(page, "w" * 300, ["word " * 40, "w" * 400])
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_for_screen_readers(page, image):
    drop(page, image)
    fill_in(page, "Which?", ["one", "two", "three"])
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
    controls = [pair for pair in named if pair[0] in ("textbox", "button", "image", "table", "form")]
    assert len(controls) > 10 and all(name for _, name in controls), controls
    assert ("textbox", "Prompt") in named and ("button", "Remove answer 3") in named


# The least contrast of all texts that are shown, by the formula of WCAG 2.2.
CONTRAST = """
(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([red, green, blue]) => [red, green, blue].map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    throw new Error("nothing has a ground");
  };
  const ratios = [...document.querySelectorAll("body *")]
    .filter((one) => one.checkVisibility())
    .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .map((one) => [light(channels(getComputedStyle(one).color)), light(ground(one))])
    .map(([one, other]) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05));
  return Math.min(...ratios);
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(page, dark):
    page.resize(1200, dark=dark)
    fill_in(page, "Which?", ["one", "two"])
    page.evaluate("(document.getElementById('error').hidden = false, document.getElementById('error').append('wrong'))")
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG 2.2, level AA
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")

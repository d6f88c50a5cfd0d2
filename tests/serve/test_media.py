"""The files and URLs that requests may name: none by default, and never one outside what was allowed."""

import asyncio
import base64
import contextlib
import functools
import http.server
import socket
import sys
import threading

import pytest

from fastrm.data.record import ImageRef, VideoRef
from fastrm.data.sources.layouts.groups import group_record
from fastrm.errors import RecordError
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.limits import MediaLimits
from fastrm.serve import media
from fastrm.serve.media import MediaPolicy
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from tests.helpers.support import make_image, make_model
from tests.helpers.waiting import PATIENCE, wait_until

DATA = make_image(56, 56).data
# Where a request may name a medium: every form that groups are read in.
FORMS = {
    "images": lambda place: {"prompt": "a", "images": [place], "responses": ["b"]},
    "image": lambda place: {"prompt": "a", "image": place, "responses": ["b"]},
    "path": lambda place: {"prompt": "a", "images": [{"path": place}], "responses": ["b"]},
    "url": lambda place: {"prompt": "a", "images": [{"url": place}], "responses": ["b"]},
    "videos": lambda place: {"prompt": "a", "videos": [place], "responses": ["b"]},
    "part": lambda place: in_content({"type": "image", "image": place}),
    "image_url": lambda place: in_content({"type": "image_url", "image_url": {"url": place}}),
    "video part": lambda place: in_content({"type": "video", "video": place}),
}


def in_content(part):
    return {
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": "a"}]}],
        "responses": ["b"],
    }


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "below").mkdir(parents=True)
    for path in (folder / "a.png", folder / "below" / "b.png", tmp_path / "secret.png", tmp_path / "rootless.png"):
        path.write_bytes(DATA)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inner.png").symlink_to(folder / "a.png")
    (folder / "up").symlink_to(tmp_path)
    return folder


OPENED = []


@pytest.fixture
def opened():
    """Files, names and addresses that are asked for while the test runs."""
    if not OPENED:
        OPENED.append(None)
        sys.addaudithook(lambda event, args: OPENED[0] is not None and OPENED[0](event, args))
    found = []
    watched = ("open", "socket.connect", "socket.getaddrinfo")
    OPENED[0] = lambda event, args: found.append((event, args[:2])) if event in watched else None
    yield found
    OPENED[0] = None


def read(group, policy):
    return group_record(group, 0, resolve=policy.resolver(waits=True))


PAYLOADS = [
    "secret.png", "../secret.png", "/etc/passwd", "/proc/self/environ", "file:///etc/passwd", "file://host/a",
    "file://localhost/etc/passwd", "FILE:///etc/passwd", "~/a.png", "\\\\host\\share\\a.png", "/dev/zero",
    "a.png\0.jpg", "\ud800", "", ".", "..", "http://127.0.0.1/a.png", "http://169.254.169.254/latest/meta-data", "https://[::1]/a",
    "http://localhost:1/", "HTTP://127.0.0.1/", "ftp://127.0.0.1/a.png", "gopher://127.0.0.1/", "http://0/", "http://",
    "http://2130706433/", "http://user:a@127.0.0.1/", "http:////127.0.0.1", "jar:file:///a", "dict://127.0.0.1:11211/",
    "http://127.0.0.1:99999/", "//127.0.0.1/a.png", "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_by_default_nothing_is_opened_and_nobody_is_asked(form, opened):
    for payload in PAYLOADS:
        try:
            record = read(FORMS[form](payload), MediaPolicy())
        except RecordError:
            continue
        assert not record.media, payload
    assert opened == []


@pytest.mark.parametrize("form", FORMS)
def test_files_outside_the_folder_are_not_opened(form, root, opened):
    outside = [payload for payload in PAYLOADS if "/" in payload or ".." in payload]
    outside += ["link.png", "up/secret.png", "below/../../secret.png", "../rootless.png", f"{root}less.png"]
    for payload in outside:
        try:
            record = read(FORMS[form](payload), MediaPolicy(image_root=root))
        except RecordError:
            continue
        assert not record.media, payload
    assert opened == []


@pytest.mark.parametrize(
    "path", ["a.png", "below/b.png", "below/../a.png", "inner.png", "{root}/a.png", "file://{root}/a.png"]
)
def test_files_below_the_folder_become_their_bytes(path, root):
    record = read(FORMS["images"](path.format(root=root)), MediaPolicy(image_root=root))
    assert record.media == (ImageRef(data=DATA),)


def test_an_error_of_a_file_does_not_tell_the_servers_folder(root):
    with pytest.raises(RecordError, match="No such file") as caught:
        read(FORMS["images"]("missing.png"), MediaPolicy(image_root=root))
    assert str(root) not in caught.value.message


def test_a_file_over_the_limit_and_too_many_files_are_refused(root):
    with pytest.raises(RecordError) as caught:
        read(FORMS["images"]("a.png"), MediaPolicy(image_root=root, limits=MediaLimits(max_image_bytes=10)))
    assert caught.value.code == "IMAGE_TOO_LARGE"
    group = {"prompt": "a", "images": ["a.png"] * 3, "responses": ["b"]}
    with pytest.raises(RecordError) as caught:
        read(group, MediaPolicy(image_root=root, max_media=2))
    assert caught.value.code == "TOO_MANY_MEDIA"


@pytest.fixture
def site(root):
    """A web server of the folder, which sends /away elsewhere; its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "/a.png")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_is_fetched_from_a_public_address_only(site, opened):
    group = FORMS["images"](f"{site}/a.png")
    with pytest.raises(RecordError, match="not public") as caught:
        read(group, MediaPolicy(allow_urls=True))
    assert caught.value.code == "IMAGE_PATH" and [event for event, _ in opened if event == "socket.connect"] == []
    record = read(group, MediaPolicy(allow_urls=True, is_public=lambda address: True))
    assert record.media == (ImageRef(data=DATA),)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "[::1]", "[fe80::1]",
     "[::ffff:127.0.0.1]", "[fd00::1]", "100.64.0.1", "localhost", "0x7f.1", "2130706433", "224.0.0.1",
     "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[ff02::1]"],
)  # fmt: skip
def test_private_addresses_are_not_connected_to(host, opened):
    for form in FORMS:
        with pytest.raises(RecordError):
            read(FORMS[form](f"http://{host}:9/a.png"), MediaPolicy(allow_urls=True))
    assert [event for event, _ in opened if event == "socket.connect"] == []


def test_one_private_address_of_several_refuses_a_name(monkeypatch, opened):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(RecordError, match="not public"):
        read(FORMS["images"]("http://example.org/a.png"), MediaPolicy(allow_urls=True))
    assert [event for event, _ in opened if event == "socket.connect"] == []


@pytest.mark.parametrize(
    "path, limits, text",
    [
        ("/away", MediaLimits(), "redirects are not followed"),
        ("/missing.png", MediaLimits(), "status 404"),
        ("/a.png", MediaLimits(max_image_bytes=100), "more than 100 bytes"),
    ],
)
def test_redirects_errors_and_large_answers_are_refused(site, path, limits, text):
    policy = MediaPolicy(allow_urls=True, limits=limits, is_public=lambda address: True)
    with pytest.raises(RecordError, match=text):
        read(FORMS["images"](site + path), policy)


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize("head", [ANSWER, ANSWER[:9], b""], ids=["body", "header", "nothing"])
def test_a_url_that_drips_is_given_up_at_the_deadline(monkeypatch, head):
    """The site never ends its answer, and waits for the client's end of it."""
    monkeypatch.setattr(media, "_FETCH_SECONDS", 0.3)
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(head)
                while not ended.wait(0.02):
                    connection.sendall(b"1")

        site = threading.Thread(target=drip)
        site.start()
        policy = MediaPolicy(allow_urls=True, is_public=lambda address: True)
        fetching = threading.Thread(target=fetched, args=(listening.getsockname()[1], policy, found := []))
        fetching.start()
        fetching.join(PATIENCE)
        was_given_up = not fetching.is_alive()
        ended.set()
        for thread in (site, fetching):
            thread.join(PATIENCE)
    assert was_given_up and "cannot be fetched" in found[0].message and found[0].code == "IMAGE_FETCH"


def fetched(port, policy, found):
    try:
        read(FORMS["images"](f"http://127.0.0.1:{port}/a.png"), policy)
    except RecordError as error:
        found.append(error)


def test_the_look_up_of_a_host_ends_at_the_deadline(monkeypatch):
    monkeypatch.setattr(media, "_FETCH_SECONDS", 0.2)
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(PATIENCE) and [])
    found = []
    fetching = threading.Thread(target=fetched, args=(80, MediaPolicy(allow_urls=True), found))
    fetching.start()
    try:
        wait_until(lambda: found)
        assert not ended.is_set() and found[0].code == "IMAGE_FETCH" and "not found in time" in found[0].message
    finally:
        ended.set()
        fetching.join(PATIENCE)


def test_groups_without_urls_do_not_wait_for_the_hosts_of_others(monkeypatch):
    """However many wait for a host that does not answer."""
    monkeypatch.setattr(media, "_FETCH_SECONDS", PATIENCE)
    ended, scorer = threading.Event(), Scorer("tiny", Ensemble([RewardModel(make_model("qwen2"))]), 8192)
    looked_up = []

    def look_up(*_, **__):
        looked_up.append(1)
        ended.wait(PATIENCE)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    slow, plain = FORMS["images"]("http://example.org/a.png"), {"prompt": "a", "responses": ["b"]}

    async def ask():
        async with Scheduler([scorer]) as scheduler:
            asked = [
                asyncio.create_task(scheduler.submit([slow], resolver=MediaPolicy(allow_urls=True).resolver))
                for _ in range(20)
            ]
            while len(looked_up) < 4:  # as many as there are threads for groups without URLs
                await asyncio.sleep(0.001)
            found = await scheduler.score([plain])
            num_waiting = sum(not task.done() for task in asked)
            ended.set()
            return found, num_waiting, [scored.results[0].code for scored in await asyncio.gather(*asked)]

    try:
        found, num_waiting, codes = asyncio.run(asyncio.wait_for(ask(), PATIENCE))
    finally:
        ended.set()
    assert len(found[0]) == 1 and num_waiting == 20 and codes == ["IMAGE_FETCH"] * 20


def test_the_urls_of_a_group_share_one_deadline(site, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(media.time, "monotonic", lambda: now[0])
    resolve = MediaPolicy(allow_urls=True, is_public=lambda address: True).resolver(waits=True)
    fetch = MediaPolicy._fetch

    def slow(*arguments):
        data = fetch(*arguments)
        now[0] += 6.0
        return data

    monkeypatch.setattr(MediaPolicy, "_fetch", slow)
    assert [resolve(f"{site}/a.png").data for _ in range(2)] == [DATA] * 2
    with pytest.raises(RecordError, match="takes too long"):
        resolve(f"{site}/a.png")


def test_data_uris_are_always_read():
    uri = "data:image/png;base64," + base64.b64encode(DATA).decode()
    for form in ("images", "image", "part", "image_url"):
        assert read(FORMS[form](uri), MediaPolicy()).media == (ImageRef(data=DATA),)
    video = read(FORMS["videos"]("data:video/mp4;base64,AAAA"), MediaPolicy())
    assert isinstance(video.media[0], VideoRef)

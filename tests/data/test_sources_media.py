"""Images and videos of rows: forms, places, paths that must not leave their root."""

import json
import zipfile

import pytest
from PIL import Image

from fastrm.data.media.images import decode_image
from fastrm.data.record import ImageRef, VideoRef
from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.sources.media import in_archives
from fastrm.errors import DataError, RecordError
from fastrm.limits import MediaLimits
from tests.helpers.source_rows import (
    FLAT,
    GROUP,
    IMAGE,
    SAME_PAIR,
    SHAREGPT,
    TEXT_PART,
    data_uri,
    human_turns,
    png,
    shape,
    turns,
)


def test_placeholders_are_split_in_place_and_newlines_stay(read_one):
    row = {**SHAREGPT, "conversations": human_turns("<image>\nA <image>\n?"), "images": ["a.png", "b.png"]}
    assert shape(read_one(row), 0)[0] == ("user", IMAGE, "\nA ", ("image", "b.png"), "\n?")


def test_placeholders_may_be_in_different_turns(read_one):
    row = {
        **SHAREGPT,
        "conversations": human_turns("1 <image>", "ok", "2 <image>"),
        "images": ["a.png", "b.png"],
    }
    messages = shape(read_one(row), 0)
    assert messages[0] == ("user", "1 ", IMAGE)
    assert messages[2] == ("user", "2 ", ("image", "b.png"))


def test_images_without_a_place_go_first_in_the_first_user_turn(read_one):
    prompt = [{"role": "system", "content": "S"}, *turns("A", "B", "C")]
    row = {**GROUP, "prompt": prompt, "images": ["a.png", "b.png"]}
    assert shape(read_one(row), 0)[:2] == [("system", "S"), ("user", IMAGE, ("image", "b.png"), "A")]


def test_placeholder_is_plain_text_where_there_are_image_parts(read_one):
    content = [{"type": "text", "text": "Write <image>"}, {"type": "image"}]
    row = {**GROUP, "prompt": [{"role": "user", "content": content}], "images": ["a.png"]}
    assert shape(read_one(row), 0)[0] == ("user", "Write <image>", IMAGE)


@pytest.mark.parametrize("key", ["flat", "groups", "rated", "trl, implicit prompt", "llamafactory alpaca", "swift"])
def test_a_text_may_speak_of_a_placeholder_by_its_escape_or_in_a_source_without_media(read_one, refusal, key):
    text = json.dumps(SAME_PAIR[key]).replace("<image>", "").replace("What?", "Is <image> HTML?")
    row = {k: v for k, v in json.loads(text.replace('"no', '"no <video>')).items() if k not in ("image", "images")}
    code, message = refusal(row)
    assert code == "IMAGE_COUNT" and "write <<image>>, or set `images: none`" in message
    for read, options in ((row, {"images": "none"}), (json.loads(_escaped(json.dumps(row))), {})):
        record = read_one(read, **options)
        assert shape(record, 0)[0] == ("user", "Is <image> HTML?")
        assert shape(record, 1)[-1] == ("assistant", "no <video>")


def _escaped(text):
    return text.replace("<image>", "<<image>>").replace("<video>", "<<video>>")


@pytest.mark.parametrize("key", ["flat", "groups", "swift", "trl, content parts"])
def test_response_with_a_placeholder_is_refused_in_training_and_text_in_scoring(read_json_rows, key):
    row = json.loads(json.dumps(SAME_PAIR[key]).replace('"no', '"no <image>'))
    (_, ((_, code, message),)) = read_json_rows(row)
    assert code == "IMAGE_COUNT" and "response 1 holds <image>" in message and "write <<image>>" in message
    (record,), _ = read_json_rows(row, require_preferences=False)
    assert shape(record, 1)[-1] == ("assistant", "no <image>")
    (record,), _ = read_json_rows(json.loads(json.dumps(row).replace("no <image>", "no <<image>>")))
    assert shape(record, 1)[-1] == ("assistant", "no <image>")


def test_an_image_in_a_source_without_media_is_refused(refusal):
    code, message = refusal({**FLAT, "image": "a.png"}, images="none")
    assert code == "IMAGE_COUNT" and "images: none" in message


@pytest.mark.parametrize("key", ["flat", "llamafactory sharegpt", "llamafactory alpaca", "swift", "swift, old columns"])
@pytest.mark.parametrize("images", [[], ["a.png", "b.png"]])
def test_placeholder_count_is_checked(refusal, key, images):
    row = {k: v for k, v in SAME_PAIR[key].items() if k != "image"}
    if key == "flat":
        row["prompt"] = "<image>What?"
    code, message = refusal({**row, "images": images})
    assert code == "IMAGE_COUNT"
    assert f"is 1, of images in the row {len(images)}; make them equal" in message


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "<image><image>", "image": "a.png"},
        {"prompt": [{"role": "user", "content": [{"type": "image"}, TEXT_PART]}]},
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, TEXT_PART]}],
            "images": ["a.png", "b.png"],
        },
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "images": ["b.png"]},
    ],
)
def test_other_image_counts_are_refused(refusal, change):
    assert refusal({**FLAT, **change})[0] == "IMAGE_COUNT"


def test_swift_rejected_messages_must_repeat_the_images(refusal):
    row = {k: v for k, v in SAME_PAIR["swift, rejected_messages"].items() if k != "rejected_images"}
    code, message = refusal(row)
    assert code == "IMAGE_COUNT"
    assert '"rejected_images"' in message


IMAGE_FORMS = {
    "path": "a.png",
    "inner path": "x/../a.png",
    "list": ["a.png"],
    "path object": {"bytes": None, "path": "a.png"},
    "data URI": data_uri(png()),
    "data URI object": [{"url": data_uri(png())}],
}


@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_image_forms_lead_to_the_same_pixels(read_one, tmp_path, form):
    (tmp_path / "a.png").write_bytes(png())
    ref = read_one({**FLAT, "image": IMAGE_FORMS[form]}).media[0]
    assert decode_image(ref, MediaLimits()).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("value", [None, "", []])
def test_no_image_in_every_form(read_one, value):
    for key in ("image", "images"):
        assert read_one({**FLAT, key: value}).media == ()


def test_an_empty_list_hides_no_single_image(read_one):
    assert len(read_one(FLAT | {"images": [], "image": "a.png"}).media) == 1


def test_images_folder_and_absolute_paths_inside_it(read_one, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in ("a.png", str(folder / "a.png")):
        record = read_one({**FLAT, "image": path}, images=folder)
        assert record.media == (ImageRef(path=str(folder / "a.png")),)


@pytest.mark.parametrize("suffix", ["tar", "zip"])
def test_images_archive(read_json_rows, tmp_path, suffix):
    archive = tmp_path / f"images.{suffix}"
    archive.write_bytes(b"not opened by the reader")
    rows = [{**FLAT, "image": path} for path in ("x/a.png", "./x//a.png", "/x/a.png", "../a.png", "x/../..", ".")]
    records, refused = read_json_rows(*rows, images=archive)
    assert [r.media for r in records] == [(ImageRef(path=str(archive), member="x/a.png"),)] * 2
    assert [code for _, code, _ in refused] == ["IMAGE_PATH"] * 4


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "../secret.png", "x/../../secret.png", "//host/a.png", ".", "x/..",
        "http://host/a.png", "https://host/a.png", "file:///etc/passwd", "s3://bucket/a.png",
        "a\0.png", "\ud800.png", "iVBORw0KGgo" * 1000,
    ],
)  # fmt: skip
def test_paths_that_leave_the_folder_are_refused(refusal, path):
    assert refusal({**FLAT, "image": path})[0] == "IMAGE_PATH"


def test_sibling_folder_with_the_same_beginning_is_outside(refusal, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images2").mkdir()
    path = str(tmp_path / "images2" / "a.png")
    assert refusal({**FLAT, "image": path}, images=tmp_path / "images")[0] == "IMAGE_PATH"


@pytest.mark.parametrize("uri", ["data:image/png;base64,@@@", "data:image/png;base64,", "data:image/png,abc", "data:"])
def test_bad_data_uris(refusal, uri):
    assert refusal({**FLAT, "image": uri})[0] == "BAD_BASE64"


@pytest.mark.parametrize(
    "value",
    [True, 3, {"bytes": None, "path": None}, {}, {"bytes": "iVBO"}, {"path": 3}, [None], [""], [["a.png"]]],
)
def test_bad_image_values(refusal, value):
    code, message = refusal({**FLAT, "images": value})
    assert code == "BAD_ROW"
    assert '"images' in message


def test_group_record_takes_local_images_in_every_form(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    for image in (path, str(path), png(), data_uri(png()), Image.open(path), {"bytes": png()}):
        record = group_record({"prompt": "?", "images": [image], "responses": ("a", "b")}, 3)
        assert decode_image(record.media[0], MediaLimits()).getpixel((0, 0)) == (255, 0, 0)
        assert (record.id, record.source, record.origin, record.preferences) == (
            "3",
            "groups",
            "groups[3]",
            (),
        )


def test_group_record_takes_images_inside_messages():
    content = [{"type": "image", "image": Image.new("L", (4, 4))}, {"type": "text", "text": "?"}]
    record = group_record({"prompt": [{"role": "user", "content": content}], "responses": ["a"]}, 0)
    assert [m.role for m in record.responses[0].messages] == ["user", "assistant"]
    assert isinstance(record.responses[0].messages[0].parts[0], ImageRef)


@pytest.mark.parametrize(
    "group, code",
    [
        ("text", "BAD_ROW"),
        ({"prompt": "?"}, "BAD_ROW"),
        ({"prompt": "?", "responses": []}, "BAD_ROW"),
        ({"prompt": "?", "responses": ["a"], "images": ["https://host/a.png"]}, "IMAGE_PATH"),
    ],
)
def test_group_record_raises(group, code):
    with pytest.raises(RecordError) as caught:
        group_record(group, 0)
    assert caught.value.code == code


# Videos


VIDEO = ("video", "v.mp4")


@pytest.mark.parametrize("key", ["video", "videos"])
@pytest.mark.parametrize("value", ["v.mp4", ["v.mp4"], {"path": "v.mp4"}])
def test_videos_are_found_in_every_form(read_one, key, value):
    record = read_one({**FLAT, key: value})
    assert shape(record, 0) == [("user", VIDEO, "What?"), ("assistant", "yes")]
    assert type(record.media[0]) is VideoRef


def test_folder_of_frames_is_a_video(read_one, tmp_path):
    (tmp_path / "frames").mkdir()
    assert read_one({**FLAT, "video": "frames"}).media == (VideoRef(path=str(tmp_path / "frames")),)


def test_images_and_videos_fill_their_own_places(read_one):
    media = {"images": ["a.png", "b.png"], "videos": ["v.mp4"]}
    row = {**SHAREGPT, **media, "conversations": human_turns("<image>1<video>2<image>")}
    assert shape(read_one(row), 0)[0] == ("user", IMAGE, "1", VIDEO, "2", ("image", "b.png"))
    parts = [{"type": "video"}, {"type": "image"}, TEXT_PART, {"type": "image"}]
    row = {**GROUP, **media, "prompt": [{"role": "user", "content": parts}]}
    assert shape(read_one(row), 0)[0] == ("user", VIDEO, IMAGE, "What?", ("image", "b.png"))


def test_kind_without_a_place_goes_first(read_one):
    row = {**FLAT, "prompt": "A <image> B", "image": "a.png", "video": "v.mp4"}
    assert shape(read_one(row), 0)[0] == ("user", VIDEO, "A ", IMAGE, " B")


def test_video_inside_the_content_is_resolved(read_one):
    content = [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "What?"}]
    row = {**FLAT, "prompt": [{"role": "user", "content": content}]}
    assert shape(read_one(row), 0)[0] == ("user", VIDEO, "What?")


@pytest.mark.parametrize("videos", [[], ["v.mp4", "w.mp4"]])
def test_video_count_is_checked_in_strict_layouts(refusal, videos):
    row = {**SHAREGPT, "conversations": human_turns("<video>What?"), "images": [], "videos": videos}
    code, message = refusal(row)
    assert code == "VIDEO_COUNT"
    assert f"of videos in the row {len(videos)}; make them equal" in message


def test_escaped_video_placeholder_is_plain_text_beside_an_image(read_one, refusal):
    row = {**FLAT, "prompt": "Is <video> HTML? <image>", "image": "a.png"}
    assert refusal(row)[0] == "VIDEO_COUNT"
    row = {**FLAT, "prompt": "Is <<video>> HTML? <image>", "image": "a.png"}
    assert shape(read_one(row), 0)[0] == ("user", "Is <video> HTML? ", IMAGE)


def test_swift_same_text_about_another_video(read_one):
    row = {"messages": turns("<video>What?", "yes"), "videos": ["v.mp4"], "rejected_videos": ["w.mp4"]}
    record = read_one(row)
    assert [shape(record, i)[0][1] for i in (0, 1)] == [VIDEO, ("video", "w.mp4")]


@pytest.mark.parametrize("path", ["/etc/passwd", "../v.mp4", "http://host/v.mp4", "v\0.mp4"])
def test_video_paths_that_leave_the_folder_are_refused(refusal, path):
    code, message = refusal({**FLAT, "video": path})
    assert code == "VIDEO_PATH"
    assert message.startswith("video path ")


# Archives in parts, and folders of archives


def test_images_archive_in_parts_is_named_without_them(read_one, tmp_path):
    (tmp_path / "images.zip_aa").write_bytes(b"not opened by the reader")
    record = read_one({**FLAT, "image": "x/a.png"}, images=tmp_path / "images.zip")
    assert record.media == (ImageRef(path=str(tmp_path / "images.zip"), member="x/a.png"),)


@pytest.mark.parametrize("path", ["long/../../a.png", "../long/a.png", "/long/a.png", "long/../mcq/../.."])
def test_paths_that_leave_a_folder_of_archives_are_refused(tmp_path, path):
    with zipfile.ZipFile(tmp_path / "long.zip", "w") as archive:
        archive.writestr("long/a.png", png())
    resolve = in_archives(str(tmp_path))
    assert resolve("long/a.png") == ImageRef(path=str(tmp_path / "long.zip"), member="long/a.png")
    with pytest.raises(RecordError) as caught:
        resolve(path)
    assert caught.value.code == "IMAGE_PATH"


def test_damaged_archive_in_a_folder_of_archives_is_a_data_error(tmp_path):
    (tmp_path / "long.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"long\.zip"):
        in_archives(str(tmp_path))
